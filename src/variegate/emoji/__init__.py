"""The bundled emoji models and the judge of their pictures."""
