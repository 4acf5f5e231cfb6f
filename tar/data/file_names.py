"""Which image file a data set means by a name: its folder may have moved, its suffix or case may differ."""

import os
import re
import unicodedata
from collections import defaultdict
from urllib.parse import unquote

from tar import UserError
from tar.data.image_files import files_in, suffixes
from tar.data.source import counted


class Files:
    """The files below a folder whose suffix is among `kinds`; `parts` gives a path's parts as they are compared."""

    def __init__(self, folder, parts, kinds=("",)):
        self.folder, self.parts, self.paths = os.path.normpath(folder), parts, defaultdict(list)
        for path in map(os.path.normpath, files_in(folder)):
            if path.lower().endswith(tuple(kinds)):
                self.paths[parts(path)[0]].append(path)

    def find(self, name, list_file):
        """The file whose path ends in as much of a name as any, None if there is none; UserError if two fit equally.

        A name with folders does not mean a file of another folder, unless that is `folder` itself.
        """
        given, has_folders = os.path.normpath(os.path.join(self.folder, name)), len(self.parts(name)) > 1
        fits = defaultdict(list)  # {how well: paths}
        for path in self.paths.get(self.parts(given)[0], ()):
            common = len(os.path.commonprefix([self.parts(given), self.parts(path)]))  # noqa: RUF071  (of lists)
            if common > 1 or not has_folders or os.path.dirname(path) == self.folder:
                fits[path == given, os.path.splitext(path)[0] == given, common].append(path)
        best = fits[max(fits)] if fits else [None]
        if len(best) > 1:
            raise UserError(f"{list_file}: {name!r} may be {best[0]} or {best[1]}; name it as it lies in {self.folder}")
        return best[0]


def find_images(names, folder, list_file):
    """The paths of the images that a COCO file names, and a note about those that lie under another name.

    A name counts as it stands; where there is no such file, the one that Files.find gives counts, if any.
    UserError if one file fits two names, or if a name is an image written as text.
    """
    for name in names:
        if len(name) > 1000 or name.startswith("data:"):
            raise UserError(f"{list_file}: file_name {name[:40]}... is an image as text; save it as a file, name that")
    paths = [os.path.join(folder, name) for name in names]
    missing = [i for i, path in enumerate(paths) if not os.path.isfile(path)]
    if not missing:
        return paths, []
    files, moved = Files(folder, _loose_parts), []
    meant = dict(zip(map(os.path.normpath, paths), names, strict=True))
    for i in missing:
        path = files.find(names[i], list_file)
        if path:
            other, paths[i] = meant.setdefault(path, names[i]), path
            if other != names[i]:
                raise UserError(f"{list_file}: {other} and {names[i]} would both be {path}; one file is missing")
            moved.append(f"{names[i]} is {path}")
    return paths, counted(f"images lie under other names than {list_file} gives", moved)


def _loose_parts(path):
    """The parts of a path from its end without case, Unicode form and %20; also of Windows or Label Studio's ?d=."""
    return re.split(r"[\\/]+|\?d=", unicodedata.normalize("NFC", unquote(path)).casefold())[::-1]


def stem_parts(path):
    """The parts of a path from its end, without the suffix of an image or of an XML file; also of Windows."""
    *folders, last = re.split(r"[\\/]+", path)
    stem, suffix = os.path.splitext(last)
    return [stem if suffix.lower() in {".xml", *suffixes()} else last, *folders[::-1]]
