"""What a folder holds: every usual form of ImageNet is recognized here, and where the labels of its images come from.

Nothing here opens an image. `find` names the folders or tar files of each split; `labels` reads the lists of
validation labels; `words` the names of the classes; `tars` the members of tar files.
"""
