"""JoyImage Edit and Edit Plus: blocks return (image, text)."""

from variegate.architectures.layout import Architecture, dual

_BLOCKS = (dual("double_blocks", text=1),)

JOY_IMAGE_EDIT = Architecture("JoyImageEditTransformer3DModel", _BLOCKS, branches=())
JOY_IMAGE_EDIT_PLUS = Architecture("JoyImageEditPlusTransformer3DModel", _BLOCKS)
