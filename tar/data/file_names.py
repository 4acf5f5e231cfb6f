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

    def __init__(self, folder, parts, kinds=("",), without=()):
        self.folder, self.parts, self.paths = os.path.normpath(folder), parts, defaultdict(list)
        for path in map(os.path.normpath, files_in(folder) if os.path.isdir(folder) else ()):
            if path.lower().endswith(tuple(kinds)) and path not in without:
                self.paths[parts(path)[0]].append(path)

    def fitting(self, name):
        """The files whose paths end in as much of a name as any.

        A name with folders does not mean a file of another folder, unless that is `folder` itself.
        """
        given, count = os.path.normpath(os.path.join(self.folder, name)), len(self.parts(name))
        wanted, fits = self.parts(given)[:count], defaultdict(list)  # {how well: paths}
        for path in self.paths.get(wanted[0], ()):
            common = len(os.path.commonprefix([wanted, self.parts(path)]))  # noqa: RUF071  (of lists)
            if common > 1 or count == 1 or os.path.dirname(path) == self.folder:
                fits[path == given, os.path.splitext(path)[0] == given, common].append(path)
        return fits[max(fits)] if fits else []

    def find(self, name, list_file, other=""):
        """The one of fitting(name), None if there is none; of several the file called `other`, else UserError."""
        best = self.fitting(name)
        best = [path for path in best if os.path.basename(path) == other] or best
        if len(best) > 1:
            raise UserError(f"{list_file}: {name!r} may be {best[0]} or {best[1]}; name it as it lies in {self.folder}")
        return best[0] if best else None


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
    there = {os.path.normpath(path) for path in paths} - {os.path.normpath(paths[i]) for i in missing}
    files, moved, meant = Files(folder, _loose_parts, without=there), [], {}
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
    *folders, stem = re.split(r"[\\/]+", path)
    while (suffix := os.path.splitext(stem)[1]) and suffix.lower() in {".xml", *suffixes()}:  # x.jpg.xml is x
        stem = stem.removesuffix(suffix)
    return [stem, *folders[::-1]]
