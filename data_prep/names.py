"""What sets of volumes call their channels and labels, and what we call them. Each set has numbers of its own."""

import re
from collections.abc import Iterable, Mapping

from decomp_jax.data.schema import CHANNEL_ALIASES, GLIOMA_CLASSES
from decomp_jax.errors import UserError

Regions = Mapping[str, tuple[int, ...]]  # name of a label -> its values; several are a region

BACKGROUND, IGNORE = "background", "ignore"
_GLIOMA = {
    "NCR": ("ncr", "net", "ncrnet", "necrosis", "necrotic", "necroticcore", "nonenhancing", "nonenhancingtumor",
            "necroticandnonenhancingtumor", "necroticandnonenhancingtumorcore"),
    "ED": ("ed", "edema", "oedema", "peritumoraledema", "peritumoraloedema", "snfh"),
    "ET": ("et", "at", "enhancing", "enhancingtumor", "gdenhancingtumor", "activetumor"),
}
# Of nested regions, what the next smaller one leaves.
_GLIOMA_REGIONS = {"NCR": ("tumorcore", "core", "tc"), "ED": ("wholetumor", "whole", "wt")}


def _plain(name: str) -> str:
    """In one spelling. T2* is not T2, and T1+ is T1 with contrast: these signs stay."""
    return re.sub("[^a-z0-9*+]", "", name.lower()).replace("tumour", "tumor")


def _known(name: str, *tables: Mapping[str, Iterable[str]]) -> str | None:
    plain = _plain(name)
    return next((ours for table in tables for ours, others in table.items() if plain in others), None)


def channel_name(name: str) -> str:
    """Our name of a channel: that of the aliases, else its own."""
    return _known(name, CHANNEL_ALIASES) or name


def lesion_names(regions: Regions) -> dict[str, str]:
    """A set's lesion labels -> our names: NCR, ED and ET where all are known as such, else their own.

    Of a region that is left of nested ones we know what it is only where all of them are there.
    """
    alone = {name: _known(name, _GLIOMA) for name in regions}
    names = {
        name: known or (_known(name, _GLIOMA_REGIONS) if len(regions[name]) > 1 else None)
        for name, known in alone.items()
    }
    if not all(names.values()) or names != alone and {*names.values()} != {*GLIOMA_CLASSES}:
        return {name: name for name in regions}
    return names


def smallest_regions(regions: Regions, where: str) -> dict[int, str]:
    """value -> the smallest region that holds it.

    Raises:
        UserError: two regions hold a value and neither is smaller.
    """
    found: dict[int, str] = {}
    for name, values in sorted(regions.items(), key=lambda region: len(region[1])):
        for value in values:
            other = found.setdefault(value, name)
            if other != name and len(regions[other]) == len(values):
                raise UserError(
                    f"{where}: labels {other!r} and {name!r} both hold {value}; tell them apart by --labels"
                )
    return found


def in_order(names: Mapping[str, int]) -> tuple[str, ...]:
    """Classes in the order of GLIOMA_CLASSES where they are those, else of the numbers given."""
    if names.keys() <= {*GLIOMA_CLASSES}:
        return tuple(name for name in GLIOMA_CLASSES if name in names)
    return tuple(sorted(names, key=lambda name: (names[name], name)))
