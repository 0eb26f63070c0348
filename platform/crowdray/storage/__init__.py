"""Reading and publishing through fsspec, the only judge of URIs: folders, buckets and memory behave alike."""

from crowdray.storage.cache import NoRoomError, cache_folder, check_content, fetch, hash_file, verify
from crowdray.storage.files import (
    Found,
    create_bytes,
    exists,
    find_files,
    list_files,
    local_scratch,
    open_read,
    publish_directory,
    read_bytes,
    read_if_there,
    read_ranges,
    remove,
    retract_directory,
    write_bytes,
    write_file,
)
from crowdray.storage.places import PARTIAL, is_local, join, resolve

__all__ = [
    "PARTIAL",
    "Found",
    "NoRoomError",
    "cache_folder",
    "check_content",
    "create_bytes",
    "exists",
    "fetch",
    "find_files",
    "hash_file",
    "is_local",
    "join",
    "list_files",
    "local_scratch",
    "open_read",
    "publish_directory",
    "read_bytes",
    "read_if_there",
    "read_ranges",
    "remove",
    "resolve",
    "retract_directory",
    "verify",
    "write_bytes",
    "write_file",
]
