"""Reading and writing through fsspec: local folders, object stores and memory behave alike."""

from crowdray.storage.cache import CacheFullError, cache_folder, check_local_file, fetch, hash_file
from crowdray.storage.files import (
    ExclusiveCreateUnsupportedError,
    FileInfo,
    create_bytes,
    exists,
    find_files,
    is_hidden,
    list_files,
    local_copy,
    open_read,
    publish_directory,
    publish_file,
    read_bytes,
    read_bytes_or_none,
    read_ranges,
    remove,
    staging_file,
    unpublish_directory,
    write_bytes,
)
from crowdray.storage.paths import PARTIAL, filesystem, is_local, is_transient, join, resolve
from crowdray.storage.scratch import scratch_folder
