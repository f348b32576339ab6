"""`python -m variegate` is `variegate`."""

from variegate.cli import main

main()
