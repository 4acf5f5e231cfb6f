"""Finding the image files that a COCO file names, and keeping many names in little memory."""

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from urllib.parse import unquote

import numpy as np

from tar import UserError
from tar.data.image_files import files_in

LONGEST = 1000  # characters of a file's name


class FileNames(Sequence):
    """A list of paths as one array of bytes: loader processes share it, where strings would be copied in each."""

    def __init__(self, names):
        names = [os.fsencode(name) for name in names]
        self.ends = np.cumsum([0, *map(len, names)])
        self.text = np.frombuffer(b"".join(names), dtype=np.uint8)

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, index):
        index = range(len(self))[index]
        return os.fsdecode(self.text[self.ends[index] : self.ends[index + 1]].tobytes())


def find_images(names, folder, list_file):
    """The paths of the images that a COCO file names, and sentences that say what was found under another name.

    A name counts as it stands; each folder is listed once. Where there is no such file, the one below `folder` fits
    that no other name has and whose path ends in as much of the name as any: without a prefix or the path of a media
    server, with / for a backslash, a space for %20, in other case. Where the name has folders, the file must lie in the
    last of them, or in `folder` itself. Else the name stays as it is. UserError if two files fit equally, if one file
    fits two names, or if a name is an image written as text.
    """
    listed, below, found = {}, defaultdict(list), {}
    for name in names:
        if len(name) > LONGEST or name.startswith("data:"):
            raise UserError(f"{list_file}: file_name {name[:40]}... is an image as text; save it as a file, name that")
    paths = [os.path.join(folder, name) for name in names]
    missing = {i: _parts(names[i]) for i, path in enumerate(paths) if not _is_listed(path, listed)}
    if not missing:
        return paths, []
    longest, taken = max(map(len, missing.values())), set(map(os.path.normpath, paths))
    for path in map(os.path.normpath, files_in(folder)):
        parts = _parts(path) if path not in taken else ()
        for length in range(1, min(len(parts), longest) + 1):
            below[parts[:length]].append(path)
    for i, parts in missing.items():
        length = next((length for length in range(len(parts), 0, -1) if parts[:length] in below), 0)
        fits = below[parts[:length]] if length else ()
        if len(fits) > 1:
            raise UserError(f"{list_file}: {names[i]} may be {fits[0]} or {fits[1]}; name it as it lies in {folder}")
        if length == 1 < len(parts):  # another folder's file of this name must not be taken
            fits = [path for path in fits if os.path.dirname(path) == os.path.normpath(folder)]
        for path in fits:
            other, paths[i] = found.setdefault(path, names[i]), path
            if other != names[i]:
                raise UserError(f"{list_file}: {other} and {names[i]} would both be {path}; one file is missing")
    first = [f"{name} is {path}" for path, name in found.items()][:1]
    return paths, [f"{len(found)} images lie under other names than {list_file} gives: {text}" for text in first]


def _is_listed(path, listed):
    """Whether a folder's list has a path; listed: {folder: names in it}, filled in here."""
    folder, name = os.path.split(path)
    if folder not in listed:
        try:
            listed[folder] = set(os.listdir(folder))
        except (OSError, ValueError):
            listed[folder] = ()
    return name in listed[folder]


def _parts(path):
    """The parts of a path from its end without case, Unicode form and %20; also of Windows or Label Studio's ?d=."""
    return tuple(re.split(r"[\\/]+|\?d=", unicodedata.normalize("NFC", unquote(path)).casefold())[::-1])
