"""Profiles: every size and schedule of a run, in one YAML file; nothing numeric hides in code.

`sample` is the built-in tissue on a CPU in minutes, `h100` the real sets on one GPU, `paper` the paper's own schedules.
A profile names only what differs from the defaults of the stages. Those are the paper's where it prints a number
(patches, K2, CSinGAN's weights), else ours; how long and how fast a segmenter learns each profile says itself. One that
begins with ``extends: NAME`` names only what differs from that profile; there ``{}`` empties what has names of its own.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import yaml

from nucseg import gan, models
from nucseg.augment import AugmentConfig
from nucseg.config import ConfigError, from_mapping, nearest
from nucseg.data import NAMES, data_root
from nucseg.encoders import EMBEDDED
from nucseg.experiments import Experiment, GridSettings, experiments_of
from nucseg.masks import MaskConfig
from nucseg.paper import row
from nucseg.pseudo import PseudoConfig
from nucseg.selection import SelectionConfig
from nucseg.training import TrainingConfig

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Mix:
    """How often each kind of pair is drawn in training.

    Attributes
    ----------
    real, synthetic, pseudo
        Relative shares of the kinds that an arm has. All 0: every pair is drawn equally often, as in the paper, where
        nine real pairs meet 450 synthetic ones.
    """

    real: float = 0.0
    synthetic: float = 0.0
    pseudo: float = 0.0

    def __post_init__(self) -> None:
        shares = (self.real, self.synthetic, self.pseudo)
        if min(shares) < 0 or (any(shares) and not all(shares)):
            raise ValueError(f"shares must be all 0 or all above 0, got {shares}")

    def weights(self, counts: Mapping[str, int]) -> list[float] | None:
        """Return each pair's probability, up to a factor, for groups of so many pairs; None for all equal."""
        if not self.real:
            return None
        return [getattr(self, kind) / count for kind, count in counts.items() for _ in range(count)]


@dataclass(frozen=True)
class Profile:
    """One complete set of settings.

    Attributes
    ----------
    name, description
        As tables print them.
    dataset
        The dataset where none is named.
    encoder
        f(.) of Sec. III-A.
    segmenter_encoder
        The pretrained encoder that every segmenter starts from.
    weights
        Files of ImageNet weights by encoder, where they cannot be downloaded: ``{resnet50: /path/resnet50.pth}``; a
        relative path counts from the folder of the YAML file.
    grid
        Which rows of which table run, with which K1, K2, rounds and seeds.
    mask_count
        Synthetic masks per annotated patch (50 in the paper).
    minutes
        Expected minutes of each notebook: only the length of its part of the progress bar.
    synthesisers, segmenters, training
        Settings by name; a name that is left out has the defaults of its module.
    """

    name: str
    description: str
    dataset: str
    encoder: str
    segmenter_encoder: str
    grid: GridSettings
    weights: dict[str, str] = field(default_factory=dict)
    mask_count: int = 50
    mix: Mix = field(default_factory=Mix)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    masks: MaskConfig = field(default_factory=MaskConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    pseudo: PseudoConfig = field(default_factory=PseudoConfig)
    synthesisers: dict[str, Any] = field(default_factory=dict)
    segmenters: dict[str, Any] = field(default_factory=dict)
    training: dict[str, TrainingConfig] = field(default_factory=dict)
    minutes: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.mask_count < 1:
            raise ValueError(f"mask_count must be at least 1, got {self.mask_count}")
        if not self.grid.full_rounds:
            return
        if self.pseudo.method != "mean-teacher":
            raise ValueError(
                "full_rounds: where every pixel is labelled only `pseudo: {method: mean-teacher}` adds a round"
            )
        if not models.teachable(name := self.grid.substitutes.get("maskrcnn", "maskrcnn")):
            raise ValueError(
                f"full_rounds: no mean teacher can teach {name}; set grid.substitutes to {{maskrcnn: hoverlite}}"
            )

    def synthesiser(self, name: str) -> Any:
        """Return the configuration of a synthesiser."""
        return self.synthesisers.get(name) or self._shared(name) or gan.config_class(name)()

    def _shared(self, name: str) -> Any:
        # CSinGAN with and without the component-wise critics differ in nothing else.
        return self.synthesisers.get("csingan") if name == "csingan-no-cwd" else None

    def segmenter(self, name: str) -> Any:
        """Return the configuration of a segmenter."""
        return self.segmenters.get(name) or models.config_class(name)()

    def training_of(self, name: str) -> TrainingConfig:
        """Return the schedule of a segmenter."""
        return self.training.get(name) or TrainingConfig()

    def ours(self, dataset: str) -> Experiment:
        """Return the paper's full framework, the row "Ours" of Table III: CPS, CSinGAN, pseudo-labelling."""
        return experiments_of(row("III.ours"), dataset, self.grid)[0]


def names() -> list[str]:
    """Return the names of the profiles that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_profile(name: str | Path) -> Profile:
    """Read a profile by its name or the path of its YAML file.

    Raises
    ------
    ConfigError
        For an unknown profile, one of a shipped profile's name, or a setting with an unknown name or a value of the
        wrong type or range; the message names the nearest valid one.
    """
    path = FOLDER / f"{name}.yaml" if str(name) in names() else Path(name).expanduser()
    if path.suffix not in {".yaml", ".yml"} or not path.is_file():
        raise ConfigError(f"no profile {str(name)!r}; {nearest(str(name), names())} (or give the path of a YAML file)")
    where = f"profile {path.stem}"
    values = _read(path, where)
    profile = from_mapping(Profile, {"name": path.stem, **values}, where)
    _check_own_name(profile.name, path)
    _check_names(profile.training, models.REGISTRY, f"{where}.training")
    _check_encoders([*profile.weights, profile.encoder, profile.segmenter_encoder], where)
    return replace(
        profile,
        weights={name: str(path.parent / Path(file).expanduser()) for name, file in profile.weights.items()},
        synthesisers=_by_name(profile.synthesisers, gan.REGISTRY, gan.config_class, f"{where}.synthesisers"),
        segmenters=_by_name(profile.segmenters, models.REGISTRY, models.config_class, f"{where}.segmenters"),
    )


def absolute_arguments(profile: str | Path, dataset: str, root: str) -> tuple[str, str, str]:
    """Return what names a profile, a dataset and the folder of data, so that it means the same in any folder.

    Parameters
    ----------
    profile, dataset
        Names stay; paths, which a profile's YAML file and a folder of images have, become absolute.
    root
        Folder of the named datasets; empty: NUCSEG_DATA, or ``data`` here, whichever `nucseg.data.data_root` takes.
    """
    profile = str(profile)
    named = profile in names()
    folder = os.sep in dataset or (dataset and dataset not in NAMES and Path(dataset).is_dir())
    return (
        profile if named else str(Path(profile).expanduser().resolve()),
        str(Path(dataset).expanduser().resolve()) if folder else dataset,
        str(data_root(root or None).resolve()),
    )


def _read(path: Path, where: str) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _OnceEach)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: {path} is no YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: expected settings by name in {path}")
    base = values.pop("extends", None)
    if base is None:
        return values
    if base not in names():
        raise ConfigError(
            f"{where}: extends an unknown profile {base!r}; {nearest(str(base), names())} "
            "(one of your own has to be copied)"
        )
    return _merged(_read(FOLDER / f"{base}.yaml", where), values)


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Change a mapping by another one, name by name and all the way down; an empty one leaves nothing of the first."""
    deeper = [k for k, v in changes.items() if v and isinstance(v, dict) and isinstance(base.get(k), dict)]
    both = {k: _merged(base[k], changes[k]) for k in deeper}
    return {**base, **changes, **both}


class _OnceEach(yaml.SafeLoader):
    """Plain values only, as `yaml.safe_load`; of two settings with one name it would drop the first, this refuses."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key, _ in node.value:
            if key.value in seen:
                line = key.start_mark.line + 1
                raise yaml.YAMLError(f"{key.value!r} stands twice, in lines {seen[key.value]} and {line}: join the two")
            seen[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


def _check_own_name(name: str, path: Path) -> None:
    """Refuse a name that would put results into another profile's folders, or outside of `runs/` and `tables/`."""
    if not re.fullmatch(r"\w[\w .+=()-]*", name):
        raise ConfigError(
            f"{path}: the name {name!r} is to be a folder's: letters, digits, spaces and . + = ( ) - _ only"
        )
    if name in names() and path.resolve() != (FOLDER / f"{name}.yaml").resolve():
        raise ConfigError(
            f"{path}: {name!r} is a profile that comes with nucseg, in whose tables these results would stand; "
            "give the file another name"
        )


def _check_encoders(values: Iterable[str], where: str) -> None:
    own = {models.encoder_of(segmenter, "") for segmenter in models.REGISTRY} - {""}
    for name in values:
        if name not in EMBEDDED and name not in own and not timm.is_model(name):
            known = [*EMBEDDED, *own, *timm.list_models()]
            raise ConfigError(f"{where}: unknown encoder {name!r}; {nearest(name, known)}")


def _check_names(values: Iterable[str], known: Iterable[str], where: str) -> None:
    for name in values:
        if name not in known:
            raise ConfigError(f"{where}: unknown name {name!r}; {nearest(name, known)}")


def _by_name(values: dict[str, Any], registry: Mapping[str, Any], config_class: Any, where: str) -> dict[str, Any]:
    _check_names(values, registry, where)
    return {name: from_mapping(config_class(name), value, f"{where}.{name}") for name, value in values.items()}
