"""People's own data: a folder of images, annotated in one of the formats that annotation tools write."""
