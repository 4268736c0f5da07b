"""The facts of every data set that lives in files: folders, needed files, sources, sizes.

The only place where they stand; loaders, their errors, ``fastfpl data check`` and docs/datasets.md
read them here. Importing this module loads nothing heavy.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from fastfpl.data.folders import kind_of
from fastfpl.errors import InputError, Missing

__all__ = [
    "FACTS",
    "Facts",
    "Need",
    "find_folder",
    "first_missing",
    "open_root",
    "require",
    "source_of",
]

_COOP = "https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md"
_FEDBN = "https://github.com/med-air/FedBN"
_M3SDA = "https://ai.bu.edu/M3SDA/"
_CIFAR = "https://www.cs.toronto.edu/~kriz/cifar.html"
_SIX = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")
_FOUR = ("amazon", "caltech", "dslr", "webcam")


@dataclass(frozen=True)
class Need:
    """A file or folder that a set needs, relative to the set's folder.

    Attributes
    ----------
    path : str
        With ``/`` between folders.
    source : str
        Where to get it: an address, and what to take there.
    spare : bool
        Whether the set can do without it, with a split that is drawn here.
    """

    path: str
    source: str
    spare: bool = False


@dataclass(frozen=True)
class Facts:
    """What is known about a data set without looking at its files.

    Attributes
    ----------
    name, title : str
        On the command line, and as its authors write it.
    folders : tuple of str
        Spellings of the set's folder below the root; ``.`` is the root itself.
    needs : tuple of Need
        Everything that the published split needs.
    classes, train, test : int
        Published sizes.
    protocol : str
        What to know before comparing figures.
    domains : tuple of str
    images : str
        Folder inside the set's folder that paths of the split are relative to.
    split : str
        CoOp's file of the published split, or empty.
    stand_in : tuple of Need
        What is needed in place of the spare files.
    drawn : str
        How the lists are then made, or empty if nothing is spare.
    download : str
        Torchvision's class that downloads the set, or empty.
    function : str
        What begins the set's errors in place of its name, or empty.
    """

    name: str
    title: str
    folders: tuple[str, ...]
    needs: tuple[Need, ...]
    classes: int
    train: int
    test: int
    protocol: str
    domains: tuple[str, ...] = ("photos",)
    images: str = ""
    split: str = ""
    stand_in: tuple[Need, ...] = ()
    drawn: str = ""
    download: str = ""
    function: str = ""

    @property
    def op(self) -> str:
        """What begins the set's errors."""
        return f"fastfpl.data.{self.function or self.name}"

    @property
    def sources(self) -> str:
        """The addresses of everything that the set needs."""
        addresses = (need.source.split()[0].rstrip(",") for need in self.needs)
        return " and ".join(dict.fromkeys(addresses))


def _coop(path: str) -> Need:
    return Need(path, _COOP, spare=path.startswith("split_zhou"))


_THIRDS = "50 % train, 20 % validation and 30 % test of each class"
_FIFTHS = "80 % train and 20 % validation of each class's training list; the test list as published"

_ALL = (
    Facts(
        name="caltech101",
        title="Caltech101",
        folders=("caltech-101", "caltech101"),
        needs=(
            Need(
                "101_ObjectCategories",
                "https://data.caltech.edu/records/mzrjq-6wc02 (101_ObjectCategories.tar.gz)",
            ),
            _coop("split_zhou_Caltech101.json"),
        ),
        images="101_ObjectCategories",
        classes=100,
        train=4128,
        test=2465,
        protocol="BACKGROUND_Google and Faces_easy are left out; four classes are renamed",
        split="split_zhou_Caltech101.json",
        drawn=_THIRDS,
    ),
    Facts(
        name="oxford_pets",
        title="Oxford-IIIT Pets",
        folders=("oxford_pets",),
        needs=(
            Need("images", "https://www.robots.ox.ac.uk/~vgg/data/pets/ (images.tar.gz)"),
            _coop("split_zhou_OxfordPets.json"),
        ),
        images="images",
        classes=37,
        train=2944,
        test=3669,
        protocol="class names are breeds in lower case",
        split="split_zhou_OxfordPets.json",
        stand_in=(
            Need(
                "annotations/trainval.txt",
                "https://www.robots.ox.ac.uk/~vgg/data/pets/ (annotations.tar.gz)",
            ),
            Need(
                "annotations/test.txt",
                "https://www.robots.ox.ac.uk/~vgg/data/pets/ (annotations.tar.gz)",
            ),
        ),
        drawn=_FIFTHS,
    ),
    Facts(
        name="flowers102",
        title="Oxford Flowers 102",
        folders=("oxford_flowers",),
        needs=(
            Need("jpg", "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/ (102flowers.tgz)"),
            _coop("split_zhou_OxfordFlowers.json"),
        ),
        images="jpg",
        classes=102,
        train=4093,
        test=2463,
        protocol="CoOp's split, not the authors' 1020/1020/6149",
        split="split_zhou_OxfordFlowers.json",
        stand_in=(
            Need(
                "imagelabels.mat",
                "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/ (imagelabels.mat)",
            ),
            _coop("cat_to_name.json"),
        ),
        drawn=_THIRDS,
    ),
    Facts(
        name="food101",
        title="Food-101",
        folders=("food-101", "food101"),
        needs=(
            Need("images", "https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/"),
            _coop("split_zhou_Food101.json"),
        ),
        images="images",
        classes=101,
        train=50500,
        test=30300,
        protocol="CoOp's split of all images, not the authors' 750/250 a class",
        split="split_zhou_Food101.json",
        drawn=_THIRDS,
    ),
    Facts(
        name="dtd",
        title="Describable Textures",
        folders=("dtd",),
        needs=(
            Need("images", "https://www.robots.ox.ac.uk/~vgg/data/dtd/ (dtd-r1.0.1.tar.gz)"),
            _coop("split_zhou_DescribableTextures.json"),
        ),
        images="images",
        classes=47,
        train=2820,
        test=1692,
        protocol="CoOp's split, none of the authors' ten",
        split="split_zhou_DescribableTextures.json",
        drawn=_THIRDS,
    ),
    Facts(
        name="imagenet",
        title="ImageNet (ILSVRC 2012)",
        folders=("imagenet",),
        needs=(
            Need("images/train", "https://image-net.org, one folder a class"),
            Need("images/val", "https://image-net.org, sorted into one folder a class"),
            _coop("classnames.txt"),
        ),
        images="images",
        classes=1000,
        train=1281167,
        test=50000,
        protocol="tested on the validation images; two class names that CLIP's list holds twice "
        "are told apart (projectile, sunglass)",
    ),
    Facts(
        name="stanford_cars",
        title="Stanford Cars",
        folders=("stanford_cars",),
        needs=(
            Need("cars_train", "https://github.com/pytorch/vision/issues/7545 names mirrors"),
            Need("cars_test", "https://github.com/pytorch/vision/issues/7545 names mirrors"),
            _coop("split_zhou_StanfordCars.json"),
        ),
        classes=196,
        train=6509,
        test=8041,
        protocol="the year stands before the make: 2012 Audi R8 Coupe",
        split="split_zhou_StanfordCars.json",
        stand_in=(
            Need(
                "devkit/cars_meta.mat", "https://github.com/pytorch/vision/issues/7545 (car_devkit)"
            ),
            Need(
                "devkit/cars_train_annos.mat",
                "https://github.com/pytorch/vision/issues/7545 (car_devkit)",
            ),
            Need(
                "cars_test_annos_withlabels.mat",
                "https://github.com/pytorch/vision/issues/7545",
            ),
        ),
        drawn=_FIFTHS,
    ),
    Facts(
        name="fgvc_aircraft",
        title="FGVC Aircraft",
        folders=("fgvc_aircraft", "fgvc_aircraft/data", "fgvc-aircraft-2013b/data"),
        needs=tuple(
            Need(
                path,
                "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/ "
                "(fgvc-aircraft-2013b.tar.gz, its folder data)",
            )
            for path in (
                "images",
                "variants.txt",
                "images_variant_train.txt",
                "images_variant_test.txt",
            )
        ),
        images="images",
        classes=100,
        train=3334,
        test=3333,
        protocol="the authors' variants; their validation images are not used",
    ),
    Facts(
        name="sun397",
        title="SUN397",
        folders=("sun397",),
        needs=(
            Need(
                "SUN397", "https://vision.princeton.edu/projects/2010/SUN/ (SUN397.tar.gz, 37 GB)"
            ),
            _coop("split_zhou_SUN397.json"),
        ),
        images="SUN397",
        classes=397,
        train=15880,
        test=19850,
        protocol="the authors' first partition; indoor and outdoor stand before the scene",
        split="split_zhou_SUN397.json",
        stand_in=tuple(
            Need(path, "https://vision.princeton.edu/projects/2010/SUN/ (Partitions.zip)")
            for path in ("ClassName.txt", "Training_01.txt", "Testing_01.txt")
        ),
        drawn=_FIFTHS,
    ),
    Facts(
        name="ucf101",
        title="UCF101, middle frames",
        folders=("ucf101",),
        needs=(
            Need("UCF-101-midframes", f"{_COOP} (UCF-101-midframes.zip)"),
            _coop("split_zhou_UCF101.json"),
        ),
        images="UCF-101-midframes",
        classes=101,
        train=7639,
        test=3783,
        protocol="one frame of each video; the authors' first split",
        domains=("frames",),
        split="split_zhou_UCF101.json",
        stand_in=tuple(
            Need(f"ucfTrainTestlist/{path}", "https://www.crcv.ucf.edu/data/UCF101.php")
            for path in ("classInd.txt", "trainlist01.txt", "testlist01.txt")
        ),
        drawn=_FIFTHS,
    ),
    Facts(
        name="eurosat",
        title="EuroSAT, RGB",
        folders=("eurosat",),
        needs=(
            Need("2750", "https://github.com/phelber/EuroSAT (RGB, EuroSAT.zip)"),
            _coop("split_zhou_EuroSAT.json"),
        ),
        images="2750",
        classes=10,
        train=13500,
        test=8100,
        protocol="class names are CoOp's: Annual Crop Land, Highway or Road",
        domains=("satellite",),
        split="split_zhou_EuroSAT.json",
        drawn=_THIRDS,
    ),
    Facts(
        name="cifar10",
        title="CIFAR-10",
        folders=("cifar10", "cifar-10", "."),
        needs=tuple(
            Need(f"cifar-10-batches-py/{file}", f"{_CIFAR} (python version)")
            for file in (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch", "batches.meta")
        ),
        classes=10,
        train=50000,
        test=10000,
        protocol="released codes normalise by CIFAR's statistics and never augment",
        download="CIFAR10",
    ),
    Facts(
        name="cifar100",
        title="CIFAR-100",
        folders=("cifar100", "cifar-100", "."),
        needs=tuple(
            Need(f"cifar-100-python/{file}", f"{_CIFAR} (python version)")
            for file in ("train", "test", "meta")
        ),
        classes=100,
        train=50000,
        test=10000,
        protocol="fine classes; released codes normalise by CIFAR's statistics and never augment",
        download="CIFAR100",
    ),
    Facts(
        name="domainnet10",
        title="DomainNet, ten classes (FedBN)",
        folders=("DomainNet", "domainnet"),
        needs=(
            *(
                Need(f"{domain}_{part}.pkl", f"{_FEDBN} (domainnet_dataset.zip)")
                for domain in _SIX
                for part in ("train", "test")
            ),
            *(Need(domain, f"{_M3SDA} ({domain}.zip)") for domain in _SIX),
        ),
        classes=10,
        train=18278,
        test=4573,
        protocol="published federated figures rest on scrambled labels and are not comparable",
        domains=_SIX,
    ),
    Facts(
        name="office_caltech10",
        title="Office-Caltech10 (FedBN)",
        folders=("office_caltech_10",),
        needs=(
            *(
                Need(
                    f"{domain}_{part}.pkl", f"{_FEDBN} (office_caltech_10_dataset.zip)", spare=True
                )
                for domain in _FOUR
                for part in ("train", "test")
            ),
            *(Need(domain, f"{_FEDBN} (office_caltech_10_dataset.zip)") for domain in _FOUR),
        ),
        classes=10,
        train=2025,
        test=508,
        protocol="published federated figures rest on scrambled labels and are not comparable",
        domains=_FOUR,
        drawn="80 % train and 20 % test of each class in each domain",
    ),
    Facts(
        name="domainnet345",
        title="DomainNet, cleaned",
        folders=("DomainNet", "domainnet", "."),
        needs=(
            *(
                Need(f"splits/{domain}_{part}.txt", f"{_M3SDA} ({domain}_{part}.txt, cleaned)")
                for domain in _SIX
                for part in ("train", "test")
            ),
            *(Need(domain, f"{_M3SDA} ({domain}.zip, cleaned)") for domain in _SIX),
        ),
        classes=345,
        train=409832,
        test=176743,
        protocol="train and test of clipart 33525 + 14604, infograph 36023 + 15582, painting "
        "50416 + 21850, quickdraw 120750 + 51750, real 120906 + 52041, sketch 48212 + 20916",
        domains=_SIX,
    ),
)

#: The facts of every data set that lives in files, by name.
FACTS: dict[str, Facts] = {facts.name: facts for facts in _ALL}


def open_root(op: str, root: str | Path) -> Path:
    """Return the folder of the data sets with a leading ``~`` written out."""
    try:
        return Path(root).expanduser()
    except RuntimeError as error:
        raise InputError(
            f"{op}: root must be a folder; got {str(root)!r}, of a home that is not known: write "
            "it out"
        ) from error


def find_folder(facts: Facts, root: Path) -> Path:
    """Return the set's folder below ``root``: the spelling that holds most of what is needed.

    Raises
    ------
    Missing
        If there is none; the sentence says where to get the set.
    """
    # by os.path, which says no where pathlib raises: names too long, folders of another user
    if not os.path.isdir(root):
        raise Missing(f"{facts.op}: root must be a folder; got {root} ({kind_of(root)})")
    found = [
        (sum(os.path.exists(root / f / n.path) for n in facts.needs), f) for f in facts.folders
    ]
    there = [(held, f) for held, f in found if os.path.isdir(root / f) and (held or f != ".")]
    if not there:
        named = [f for f in facts.folders if f != "."]
        hint = f"name its parent, {root.parent}, or " if root.name in named else ""
        raise Missing(
            f"{facts.op}: root must hold {' or '.join(named)}; got {root} without it: {hint}"
            f"get the set from {facts.sources}; fastfpl data check {facts.name} lists its files"
        )
    # the first spelling wins a draw
    return root / max(there, key=lambda pair: pair[0])[1]


def require(facts: Facts, folder: Path) -> None:
    """Refuse a folder that lacks something that the published split needs."""
    need = first_missing(folder, facts.needs)
    if need is not None:
        path = folder / need.path
        raise Missing(
            f"{facts.op}: {path} must be there; got {kind_of(path)}: get it from {need.source}"
        )


def first_missing(folder: Path, needs: tuple[Need, ...]) -> Need | None:
    """Return the first of the files and folders that is not there."""
    return next((need for need in needs if not os.path.exists(folder / need.path)), None)


def source_of(facts: Facts, image: str) -> str:
    """Say where an image is to be had, by its path in a list."""
    inside = f"{facts.images}/{image}".lstrip("/")
    # FedBN's paths begin with the set's folder
    for path in (inside, inside.partition("/")[2]):
        for need in facts.needs:
            if path.startswith(f"{need.path}/"):
                return need.source
    return facts.needs[0].source
