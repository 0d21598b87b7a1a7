"""Sets of volumes as cases: channels and labels by name, whatever their numbers."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from data_prep.cases import Case, LabelValues
from data_prep.layouts import Found, Layout
from data_prep.names import BACKGROUND, IGNORE, Regions, channel_name, in_order, lesion_names, smallest_regions
from decomp_jax.errors import UserError


_VISIT = re.compile(r"(BraTS-[A-Z]+-\d+)-\d{3}")  # BraTS releases end a patient's name with the visit


class Volumes(NamedTuple):
    """A set of volumes under our names.

    Attributes:
        called: what the set calls each modality, lesion class and anatomy class.
    """

    cases: dict[str, Case]
    modalities: tuple[str, ...]
    lesion_classes: tuple[str, ...]
    anatomy_classes: tuple[str, ...]
    called: Mapping[str, str]


def name_volumes(
    layout: Layout,
    *,
    modalities: Sequence[str] | None,
    lesion_classes: Sequence[str],
    anatomy_labels: Sequence[str],
    unlabelled: bool,
) -> Volumes:
    """Puts names to the numbers of a layout.

    Args:
        modalities: names of the channels to take; all by default.
        lesion_classes: all of them, where this set may lack some; those of the set by default.
        anatomy_labels: names of the labels that are anatomy; the others are lesion classes.
        unlabelled: take cases of test sets that have no label.

    Raises:
        UserError: a name is unknown, ambiguous or there twice, or no lesion class is left.
    """
    numbers = _channel_numbers(layout)
    modalities = tuple(channel_name(name) for name in modalities or numbers)
    if unknown := [name for name in modalities if name not in numbers]:
        raise UserError(
            f"{layout.names}: has no channel {unknown[0]}, but {', '.join(layout.channels.values())}; take of these in "
            f"--modalities, or say which it is, as in --channels={unknown[0]}={min(layout.channels)}"
        )
    if len({*modalities}) < len(modalities):
        raise UserError(f"--modalities={','.join(modalities)}: has a channel twice; name each once")
    found = [case for case in layout.cases if case.label or "test" not in case.folds or unlabelled]
    meanings = _Meanings(layout, lesion_classes, anatomy_labels)
    cases = {
        case.case_id: Case(
            case.case_id,
            case.subject or (match[1] if (match := _VISIT.fullmatch(case.case_id)) else case.case_id),
            {name: case.images[number] for name, number in numbers.items() if number in case.images},
            case.label,
            meanings.of_case(case),
            case.folds,
        )
        for case in found
    }
    called = {name: layout.channels[numbers[name]] for name in modalities} | meanings.called
    return Volumes(cases, modalities, meanings.lesion_classes, meanings.anatomy_classes, called)


def describe(layout: Layout, volumes: Volumes) -> str:
    """One line: what was found."""
    def listed(names: Sequence[str]) -> str:
        called = {name: volumes.called.get(name, name) for name in names}
        return ", ".join(name if called[name] == name else f"{name} ({called[name]})" for name in names)

    labelled = sum(case.label is not None for case in volumes.cases.values())
    anatomy = f"; anatomy {listed(volumes.anatomy_classes)}" if volumes.anatomy_classes else ""
    left_out = len(layout.cases) - len(volumes.cases)
    return (
        f"{layout.names.parent}: {layout.title}; {len(volumes.cases)} cases, {labelled} labelled"
        + (f" ({left_out} more without labels: --unlabelled)" if left_out else "")
        + f"; channels {listed(volumes.modalities)}; lesion classes {listed(volumes.lesion_classes)}{anatomy}"
        + (f"; {len(layout.left_out)} files left out, first {layout.left_out[0]}" if layout.left_out else "")
    )


def _channel_numbers(layout: Layout) -> dict[str, int]:
    numbers: dict[str, int] = {}
    for number, name in sorted(layout.channels.items()):
        if numbers.setdefault(channel_name(name), number) != number:
            raise UserError(
                f"{layout.names}: channels {numbers[channel_name(name)]} and {number} are both {channel_name(name)}; "
                "tell them apart by --channels"
            )
    return numbers


class _Meanings:
    """What the label values of each case mean.

    Attributes:
        called: what the set calls each class.
    """

    def __init__(self, layout: Layout, lesion_classes: Sequence[str], anatomy_labels: Sequence[str]) -> None:
        self._layout, self._anatomy_labels = layout, anatomy_labels
        regions = [case.regions for case in layout.cases if case.regions is not None] or [layout.regions]
        # By the labels of all cases: what one is called depends on the others, and cases may lack some.
        self._names = lesion_names(
            {name: values for one in regions for name, values in one.items() if self._is_lesion(name, values)}
        )
        self.called: dict[str, str] = {}
        lesions: dict[str, int] = {}
        anatomy: dict[str, int] = {}
        for one in {tuple(one.items()): one for one in regions}.values():
            for classes, values in ((lesions, self._lesion(one)), (anatomy, self._anatomy(one))):
                for value, name in sorted(values.items()):
                    classes.setdefault(name, value)
        self.lesion_classes, self.anatomy_classes = tuple(lesion_classes) or in_order(lesions), tuple(anatomy_labels)
        there = sorted({name for one in regions for name in one})
        if unknown := [name for name in anatomy_labels if name not in anatomy]:
            raise UserError(f"--anatomy_labels: no label is called {unknown[0]}; {layout.names} has {', '.join(there)}")
        if not self.lesion_classes:
            raise UserError(
                f"{layout.names}: no label is left for a lesion, of {', '.join(there) or 'none'}; name fewer "
                "--anatomy_labels, or what a lesion could be with --lesion_classes"
            )
        if missing := [name for name in lesions if name not in self.lesion_classes]:
            raise UserError(f"--lesion_classes: lacks {missing[0]}, which {layout.names} has; name all classes")

    def of_case(self, case: Found) -> LabelValues:
        regions = self._layout.regions if case.regions is None else case.regions
        lesion, anatomy = self._lesion(regions), self._anatomy(regions)
        ignored = [value for name, values in regions.items() if name.lower() == IGNORE for value in values] or [None]
        if len(ignored) > 1:
            raise UserError(f"{self._layout.names}: label {IGNORE} has several values; name one")
        values = {value for values in regions.values() for value in values} - {*ignored}
        return LabelValues(
            lesion={
                value: 1 + self.lesion_classes.index(lesion[value]) if value in lesion else 0
                for value in sorted(values)
            },
            anatomy={value: 1 + self.anatomy_classes.index(name) for value, name in anatomy.items()},
            ignore=ignored[0],
            hint=f"name it with --labels (there are {', '.join(regions)})",
        )

    def _is_lesion(self, name: str, values: Sequence[int]) -> bool:
        """0 is the background in all layouts, whatever it is called."""
        return name not in self._anatomy_labels and name.lower() not in (BACKGROUND, IGNORE) and tuple(values) != (0,)

    def _lesion(self, regions: Regions) -> dict[int, str]:
        """value -> our name of its lesion class."""
        lesions = {name: values for name, values in regions.items() if self._is_lesion(name, values)}
        self.called |= {self._names[name]: name for name in lesions}
        found = smallest_regions(lesions, str(self._layout.names))
        if 0 in found:
            raise UserError(f"{self._layout.names}: label {found[0]!r} holds 0, which is the background; take it out")
        return {value: self._names[name] for value, name in found.items()}

    def _anatomy(self, regions: Regions) -> dict[int, str]:
        anatomy = {name: values for name, values in regions.items() if name in self._anatomy_labels}
        self.called |= {name: name for name in anatomy}
        return smallest_regions(anatomy, str(self._layout.names))
