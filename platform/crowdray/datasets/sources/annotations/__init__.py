"""Users' own data: a folder of images with annotations in a common export format."""
