"""CABM: content-aware bit mapping (Tian et al., CVPR 2023, arXiv 2304.06454).

The bits of all places follow from one number of the image, its edge score, by a table: the row of the nearest score at
or below that of the image. A row is the cheapest set of bits that a network with trained bit selectors chose for a
patch of that score. Nothing is learned and nothing is computed from features, so bits are known before the forward.

Two things of the release are mended: scores are those of pixels in 0..255 (the release takes nearly every pixel as
255), and an image below the first usable score takes that one (the release searches forever).
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Union

import torch
from pydantic import Field, ValidationError, field_validator, model_validator
from torch import Tensor

from qsr_plugin.quant.explain import explain
from qsr_plugin.quant.image_stats import EDGE_OPS, edge_scores
from qsr_plugin.quant.policy import BitDecision, BitPolicy, NetworkPolicy, register_policy
from qsr_plugin.quant.quantizer import StrictOptions
from qsr_plugin.quant.recipe import RecipeError
from qsr_plugin.quant.record import ForwardRecord

_MAKE_ONE = "make one with 'qsr table MODEL --images LR_FOLDER -o FILE' from a network with trained bit selectors"
#: Scores are told apart to two decimals, as published; whole numbers of hundredths have no rounding error.
_HUNDREDTHS = 100
_CHARACTERS = "0123456789abcdefg"
_WIDTHS = {character: width for width, character in enumerate(_CHARACTERS)}


def score_keys(scores: Tensor) -> Tensor:
    """Edge scores as whole numbers of hundredths, of the same shape: what tables are made and searched with."""
    return (scores * _HUNDREDTHS).round().long()


def key_score(key: int) -> float:
    """The score of a key."""
    return key / _HUNDREDTHS


def as_characters(widths: Iterable[int]) -> str:
    """Bit widths as one row of :attr:`BitTable.bits`."""
    return "".join(_CHARACTERS[width] for width in widths)


class BitTable(StrictOptions):
    """Bits of all places by edge score, as plain data.

    Attributes:
        places: Names ``site.port`` of the places with a choice.
        candidates: Bit widths they choose from, ascending.
        scores: Edge score of each row, 0 to 255 in steps of 0.01, ascending; a score may have several rows.
        bits: For each row one character per place, in the order of ``places``: its bits, ``a`` to ``g`` are 10 to 16.
            Rows of one score are in the order of their mean bits.
        patch: Side in LR pixels of the patches it was made from.
        step: Distance between them in LR pixels.
    """

    places: tuple[str, ...] = Field(min_length=1)
    candidates: tuple[int, ...] = Field(min_length=2)
    scores: tuple[float, ...] = Field(min_length=1)
    bits: tuple[str, ...] = Field(min_length=1)
    patch: int = Field(ge=1)
    step: int = Field(ge=1)

    @field_validator("candidates")
    @classmethod
    def _candidates(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if list(value) != sorted(set(value)) or not 2 <= value[0] <= value[-1] <= 16:
            raise ValueError(f"are {list(value)}. Allowed: ascending bit widths, 2 to 16")
        return value

    @field_validator("places")
    @classmethod
    def _places(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        twice = [place for place in value if value.count(place) > 1]
        if twice:
            raise ValueError(f"'{twice[0]}' is there more than once. Allowed: each place once")
        return value

    @model_validator(mode="after")
    def _check(self) -> BitTable:
        if len(self.scores) != len(self.bits):
            raise ValueError(f"{len(self.scores)} scores for {len(self.bits)} rows of bits. Allowed: as many as rows")
        for score in self.scores:
            if not 0 <= score <= 255 or abs(score * _HUNDREDTHS - round(score * _HUNDREDTHS)) > 1e-6:
                raise ValueError(f"score {score}. Allowed: 0 to 255 in steps of 0.01")
        allowed = {_CHARACTERS[width] for width in self.candidates}
        for score, row in zip(self.scores, self.bits):
            if len(row) != len(self.places):
                raise ValueError(
                    f"score {score}: bits '{row}' are for {len(row)} places. Allowed: one character for each of the "
                    f"{len(self.places)} places"
                )
            if not allowed.issuperset(row):
                raise ValueError(f"score {score}: bits '{row}'. Allowed: {', '.join(sorted(allowed))}")
        order = list(zip(self.scores, self.fabs()))
        for before, after in zip(order, order[1:]):
            if before > after:
                raise ValueError(
                    f"score {after[0]} with {after[1]:g} bits comes after score {before[0]} with {before[1]:g} bits. "
                    "Allowed: ascending scores, and ascending mean bits within a score"
                )
        return self

    def rows(self) -> list[list[int]]:
        """Bit widths of each row, in the order of the places."""
        return [[_WIDTHS[character] for character in row] for row in self.bits]

    def fabs(self) -> list[float]:
        """Feature average bit width of each row: the plain mean over its places."""
        return [sum(row) / len(row) for row in self.rows()]

    def keys(self) -> list[int]:
        """Scores in hundredths."""
        return [round(score * _HUNDREDTHS) for score in self.scores]

    def cheapest(self) -> BitTable:
        """Only what a look-up can ever reach: the first row of each score, unless it repeats the row before."""
        first = dict(zip(reversed(self.scores), reversed(self.bits)))  # of equal scores the last one given stays
        scores = sorted(first)
        kept = [score for before, score in zip([None, *scores], scores) if first.get(before) != first[score]]
        return self.model_copy(update={"scores": tuple(kept), "bits": tuple(first[score] for score in kept)})


def read_table(path: Union[str, Path]) -> BitTable:
    """Read a table that ``qsr table`` wrote; JSON is data only, so nothing in it is ever run.

    Raises:
        ValueError: If it is no such file, naming it and what is wrong.
    """
    path = Path(path).expanduser()
    try:
        data = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); {_MAKE_ONE}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); {_MAKE_ONE}") from None
    if not isinstance(data, Mapping):
        raise ValueError(f"{path} holds {type(data).__name__}, expected a bit table; {_MAKE_ONE}")
    try:
        return BitTable.model_validate(data)
    except ValidationError as error:
        raise ValueError(f"not a bit table; {_MAKE_ONE}\n{explain(error, BitTable, data, str(path))}") from None


class EdgeTable(NetworkPolicy):
    """The table as tensors, ready to be looked up; one for all places.

    Training uses only rows below ``max_bits_train``: an image whose row is not takes the nearest usable one below, or
    the first usable one. That is decided here, so that a look-up is one search.

    Raises:
        RecipeError: If the table is not for this network.
    """

    def __init__(
        self,
        options: EdgeTablePolicy.Options,
        candidates: tuple[int, ...],
        places: tuple[str, ...],
        channels: tuple[int, ...],
    ) -> None:
        super().__init__(options, candidates, places, channels)
        table = options.table.cheapest()
        _check_fit(table, candidates, places)
        self._column = {place: number for number, place in enumerate(places)}
        rows = torch.tensor(table.rows(), dtype=torch.float32)[:, [table.places.index(place) for place in places]]
        self.register_buffer("keys", torch.tensor(table.keys()), persistent=False)
        for mode, limit in (("train", options.max_bits_train), ("test", options.max_bits_test)):
            usable = [index for index, fab in enumerate(table.fabs()) if fab < limit]
            below = [usable[max(bisect_right(usable, index) - 1, 0)] for index in range(len(rows))]
            self.register_buffer(f"{mode}_bits", rows[below].t().contiguous(), persistent=False)

    def look_up(self, scores: Tensor) -> Tensor:
        """Bits ``(P, N)`` of all places, in the order of ``places``, for edge scores ``(N,)``."""
        found = torch.searchsorted(self.keys, score_keys(scores), right=True) - 1
        return (self.train_bits if self.training else self.test_bits)[:, found.clamp_(min=0)]

    def bits_of(self, place: str, record: ForwardRecord) -> Tensor:
        """Bits ``(N,)`` of one place; all of them are looked up once per forward."""
        return record.once(self._of_images)[self._column[place]]

    def _of_images(self, record: ForwardRecord) -> Tensor:
        return self.look_up(edge_scores(record.image))


@register_policy("edge_table")
class EdgeTablePolicy(BitPolicy):
    """Bits from a table of edge scores, for one place.

    Raises:
        RecipeError: If there is no table.
    """

    class Options(StrictOptions):
        """Options of :class:`EdgeTablePolicy`.

        Attributes:
            table: A :class:`BitTable`. In a recipe it may be the path of the file that ``qsr table`` wrote, relative to
                the working folder; the recipe then takes in what the look-up needs of it and can do without the file.
            max_bits_train: Training uses only rows of fewer mean bits (published: 6).
            max_bits_test: The same for evaluation; 100, as published, lets every row pass.
        """

        table: Union[BitTable, str, None] = None
        max_bits_train: float = Field(6.0, gt=0)
        max_bits_test: float = Field(100.0, gt=0)

        @field_validator("table", mode="before")
        @classmethod
        def _content(cls, value: Any) -> Any:
            return BitTable.model_validate(value) if isinstance(value, Mapping) else value

        @model_validator(mode="after")
        def _usable(self) -> EdgeTablePolicy.Options:
            least = min(self.table.fabs()) if isinstance(self.table, BitTable) else -math.inf
            for name in ("max_bits_train", "max_bits_test"):
                limit = getattr(self, name)
                if least >= limit:
                    raise ValueError(
                        f"{name} is {limit:g}, and no row of the table has fewer mean bits: the smallest have "
                        f"{least:g}. Allowed: more than {least:g}; or train bit selectors longer and make a new table"
                    )
            return self

    network = EdgeTable

    def __init__(
        self, options: Options, candidates: tuple[int, ...], channels: int | None = None, channel_axis: int = 1
    ) -> None:
        super().__init__(options, candidates, channels, channel_axis)
        if options.table is None:
            raise RecipeError(f"policy 'edge_table' needs policy.table, a file: {_MAKE_ONE}")
        if isinstance(options.table, str):
            raise RecipeError(f"policy.table: {options.table} did not exist when the recipe was read; {_MAKE_ONE}")

    @classmethod
    def with_files(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """Put the content of the table into the options. A file that is not there yet is left to be asked for."""
        table = options.get("table")
        if not isinstance(table, (str, Path)):
            return dict(options)
        if not Path(table).expanduser().exists():
            return {**options, "table": str(table)}
        return {**options, "table": read_table(table).cheapest().model_dump(mode="json")}

    def decide(self, features: Tensor, record: ForwardRecord | None) -> BitDecision:
        """Bits ``(N,)`` of each image at this place."""
        if record is None:
            raise RuntimeError(f"{self.place}: its bits follow from the image: run the whole network, not a part of it")
        return BitDecision(record.policy.bits_of(self.place, record))

    def shared_ops(self, record: ForwardRecord) -> int:
        """The edge score of the image."""
        return EDGE_OPS * record.pixels


def _check_fit(table: BitTable, candidates: tuple[int, ...], places: tuple[str, ...]) -> None:
    """Refuse a table of other places or bit widths."""
    missing = [place for place in places if place not in table.places]
    more = [place for place in table.places if place not in places]
    if missing or more:
        which = f"has no bits for {missing[0]}" if missing else f"has bits for {more[0]}, which is no place of it"
        raise RecipeError(
            f"policy.table does not fit the network: it has {len(table.places)} places, the network {len(places)}; it "
            f"{which}. Give the table of a network with the same backbone and placement, or {_MAKE_ONE}"
        )
    unknown = sorted({width for row in table.rows() for width in row} - set(candidates))
    if unknown:
        raise RecipeError(
            f"policy.table has places at {unknown[0]} bits. Allowed are the recipe's candidates {list(candidates)}: "
            f"give bits.act: {list(table.candidates)}, or another table"
        )
