"""Sources, decoding, validation, and the image index: from a user's images to numbered squares of pixels."""
