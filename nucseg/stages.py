"""The stages of an experiment, joined: the only module that knows more than one of them.

    features -> selection -> masks -> synthesis -> training -> (pseudo labels -> training) x rounds -> evaluation

Each arrow is a folder in the store, named by all that it depends on, so experiments that share a stage share its
result: the rows of Table I differ from the selection on, those of Table II from the synthesis on.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nucseg import gan, kernels, metrics, models
from nucseg.augment import AugmentConfig
from nucseg.checkpoints import Checkpoint
from nucseg.config import to_plain
from nucseg.data import Dataset, load_dataset
from nucseg.devices import device_of
from nucseg.encoders import Encoder, weights_file, weights_version
from nucseg.experiments import RANDOM_STRATEGIES, Experiment
from nucseg.inference import predict_all
from nucseg.masks import holds_nucleus, synthesize_with_report
from nucseg.mean_teacher import MeanTeacher
from nucseg.models.base import RANDOM, Segmenter
from nucseg.profiles import Profile, load_profile
from nucseg.progress import task
from nucseg.pseudo import PseudoConfig, pseudo_pairs
from nucseg.selection import PatchFeatures, Selection, extract, select
from nucseg.store import Result, Store, beside, home
from nucseg.training import train

Pair = tuple[np.ndarray, np.ndarray]  # image (H, W, 3) uint8, label map (H, W) int32

# The modules whose code makes each stage's result; a test sees to it that all they import is named too.
KERNEL_CODE = ("nucseg.norm_act", "nucseg.recording", "nucseg.kernels")
SELECTION_CODE = ("nucseg.selection", "nucseg.encoders", *KERNEL_CODE)
MASK_CODE = ("nucseg.masks", "nucseg.labels")
SYNTHESIS_CODE = ("nucseg.gan", "nucseg.labels", *KERNEL_CODE)
MODEL_CODE = (
    *("nucseg.models", "nucseg.training", "nucseg.schedule", "nucseg.steps", "nucseg.crops", "nucseg.augment"),
    *("nucseg.inference", "nucseg.encoders", "nucseg.labels", "nucseg.stain", *KERNEL_CODE),
)
TEACHER_CODE = (*MODEL_CODE, "nucseg.mean_teacher")
PSEUDO_CODE = (*MODEL_CODE, "nucseg.pseudo", "nucseg.mean_teacher")
EVALUATION_CODE = ("nucseg.metrics", *MODEL_CODE)


class Stages:
    """The stages of one profile on one dataset.

    Parameters
    ----------
    profile
        A profile or its name: ``"sample"``, ``"h100"``, ``"paper"`` or the path of a YAML file.
    dataset
        A dataset or its name; the profile's own default when empty.
    data_root
        Where data lie; ``NUCSEG_DATA`` when empty.
    device
        ``"cuda"`` where there is one, else ``"cpu"``, when empty.
    results
        The folder of results; ``runs/<profile>`` in the checkout when None.
    """

    def __init__(
        self,
        profile: Profile | str | Path = "sample",
        dataset: Dataset | str = "",
        data_root: str | Path = "",
        device: str = "",
        results: str | Path | None = None,
    ):
        self.profile = profile if isinstance(profile, Profile) else load_profile(profile)
        name = dataset or self.profile.dataset
        self.dataset = load_dataset(name, data_root or None) if isinstance(name, str) else name
        self.device = device_of(device)  # may be the workers' of a cluster: whether it is here is asked where work is
        runs = home() / "runs"
        folder, others = (results, None) if results else (runs / self.profile.name, runs)
        self.store = Store(folder, others, self.device.type)

    # Each stage has two methods: one named by a participle that makes its result where it is missing, and one named by
    # a noun that reads it. Keys are computed without reading any array.

    # -- which pixels ------------------------------------------------------------------------------------------

    def described(self) -> Result:
        """Compute f(x) and f(x_p) of every training patch (Sec. III-A)."""
        config, encoder = self.profile.selection, self.profile.encoder

        def make(folder: Path) -> None:
            net = Encoder(encoder, self.profile.weights.get(encoder), config.normalise)
            with task(f"features by {encoder}") as progress:
                features = extract(self.dataset.train, net, config, self.device, progress)
            np.savez(folder / "features.npz", **features.to_arrays())

        names = ("size", "step", "cover_border", "tissue", "normalise", "precision")
        what = {name: getattr(config, name) for name in names}
        version = weights_version(encoder, self.profile.weights.get(encoder))
        what |= {"encoder": encoder, "weights": version, "device": self.device.type}
        return self.store.get("features", what, make, [self.dataset.fingerprint], SELECTION_CODE)

    @cached_property
    def _features(self) -> PatchFeatures:
        with np.load(self.described().path / "features.npz", allow_pickle=False) as arrays:
            return PatchFeatures.from_arrays(dict(arrays))

    def features(self) -> PatchFeatures:
        """Return the features of every training patch."""
        return self._features

    def selected(self, experiment: Experiment) -> Result:
        """Choose the patches that an experiment annotates."""
        chosen = (experiment.selection, experiment.k1, experiment.k2, experiment.seed)
        random = experiment.selection in RANDOM_STRATEGIES
        config = self.profile.selection

        def make(folder: Path) -> None:
            with task(f"selection by {experiment.selection}"):
                selection = select(
                    self.dataset.train,
                    *chosen[:3],
                    size=config.size,
                    step=config.step,
                    seed=experiment.seed,
                    config=config,
                    encoder=self.profile.encoder,
                    features=None if random else self.features(),
                    device=self.device,
                )
            (folder / "selection.json").write_text(json.dumps(selection.to_dict()))

        inputs = [self.dataset.fingerprint, "" if random else self.described().key]
        return self.store.get("selection", (chosen, config), make, inputs, SELECTION_CODE)

    def selection(self, experiment: Experiment) -> Selection:
        """Return the patches that an experiment annotates."""
        return Selection.from_dict(json.loads((self.selected(experiment).path / "selection.json").read_text()))

    def annotated(self, experiment: Experiment) -> list[Pair]:
        """Return images and label maps of the chosen patches: the pathologist's work, here cut from the truth."""
        return [
            (sample.image[patch.slices], sample.labels[patch.slices].astype(np.int32))
            for patch in self.selection(experiment).patches
            for sample in [self.dataset.sample(patch.image_id)]
        ]

    # -- more pairs --------------------------------------------------------------------------------------------

    def sources(self, experiment: Experiment) -> list[Pair]:
        """Return the annotated patches with a nucleus of `MaskConfig.min_area`: the others have nothing to lay out.

        Those come from sparse tissue, or hold the rims of nuclei alone; they stay in the training set all the same.
        """
        pairs = [pair for pair in self.annotated(experiment) if holds_nucleus(pair[1], self.profile.masks.min_area)]
        if not pairs:
            raise ValueError(f"{experiment.selection}: no chosen patch holds a nucleus, so nothing can be synthesised")
        return pairs

    def masked(self, experiment: Experiment) -> Result:
        """Synthesise label maps from the annotated patches (Sec. III-B)."""
        size, count, config = self.profile.selection.size, self.profile.mask_count, self.profile.masks

        def make(folder: Path) -> dict:
            pairs = self.sources(experiment)
            masks, sparse = [], 0
            with task("mask synthesis", len(pairs)) as progress:
                for i, (_, labels) in enumerate(pairs):
                    seed = int(np.random.SeedSequence([experiment.seed, i]).generate_state(1)[0])
                    made, report = synthesize_with_report(labels, count, size, seed, config)
                    sparse += int((~report.reached).sum())
                    masks.append(made)
                    progress.update(i + 1)
            np.savez_compressed(folder / "masks.npz", masks=np.stack(masks).astype(np.uint16))
            return {"sparser_than_wanted": sparse, "patches_without_nuclei": experiment.k1 - len(pairs)}

        what = ("patches with nuclei", config, size, count, experiment.seed)
        return self.store.get("masks", what, make, [self.selected(experiment).key], MASK_CODE)

    def masks(self, experiment: Experiment) -> np.ndarray:
        """Return the synthetic label maps of each of `sources`, (sources, count, size, size) int32."""
        with np.load(self.masked(experiment).path / "masks.npz", allow_pickle=False) as arrays:
            return arrays["masks"].astype(np.int32)

    def synthesised(self, experiment: Experiment) -> Result:
        """Train the generators of an experiment: ``generator.safetensors``, ``images.npz`` and ``history.npz``."""
        name = experiment.augmentation
        config = self.profile.synthesiser(name)

        def make(folder: Path) -> dict:
            synthesiser, masks = gan.build(name, config, self.device), self.masks(experiment)
            finished_scales, began = beside(folder, "scales"), time.time()
            if finished_scales.is_file():
                synthesiser.from_tensors(load_file(finished_scales))
                with safe_open(finished_scales, "pt") as file:
                    began -= float((file.metadata() or {}).get("seconds", 0))

            def keep(tensors: dict[str, torch.Tensor]) -> None:
                save_file(tensors, folder / "scales", {"seconds": str(time.time() - began)})
                (folder / "scales").replace(finished_scales)
                self.store.check_time("synthesis")

            with task(f"training {name}") as progress:
                synthesiser.fit(self.sources(experiment), masks, experiment.seed, progress, checkpoint=keep)
            with task(f"images by {name}"):
                images = synthesiser.generate(masks, seed=experiment.seed)
            np.savez_compressed(folder / "images.npz", images=images)
            save_file(synthesiser.to_tensors(), folder / "generator.safetensors")
            curves = {f"scale{i}": losses.numpy() for i, losses in enumerate(synthesiser.history)}
            np.savez_compressed(folder / "history.npz", terms=np.array(synthesiser.terms), **curves)
            finished_scales.unlink(missing_ok=True)
            return {
                "seconds": round(time.time() - began, 2),
                "divergences": [str(divergence) for divergence in synthesiser.divergences],
                "left_out": list(synthesiser.left_out),
            }

        inputs = [self.selected(experiment).key, self.masked(experiment).key]
        return self.store.get(
            "synthesis",
            (name, config, experiment.seed, self.device.type),
            make,
            inputs,
            SYNTHESIS_CODE,
        )

    def synthesiser(self, experiment: Experiment) -> gan.Synthesizer:
        """Return the trained generators of an experiment."""
        made = gan.build(experiment.augmentation, self.profile.synthesiser(experiment.augmentation), self.device)
        return made.from_tensors(load_file(self.synthesised(experiment).path / "generator.safetensors"))

    def synthetic(self, experiment: Experiment) -> list[Pair]:
        """Return the synthetic pairs of an experiment; their instances come from mask synthesis itself (A27).

        A patch whose training diverged twice at the coarsest scale has none (the result's ``left_out``).
        """
        made, masks = self.synthesised(experiment), self.masks(experiment)
        with np.load(made.path / "images.npz", allow_pickle=False) as arrays:
            images = arrays["images"]
        kept = [i for i in range(len(masks)) if i not in made.meta["left_out"]]
        images, masks, size = images[kept], masks[kept], images.shape[2]
        return list(zip(images.reshape(-1, size, size, 3), masks.reshape(-1, size, size), strict=True))

    # -- segmentation ------------------------------------------------------------------------------------------

    def build(self, experiment: Experiment, pretrained: bool = True) -> Segmenter:
        """Return the untrained segmenter of an experiment, its encoder pretrained."""
        config, encoder = self.profile.segmenter(experiment.segmenter), self.profile.segmenter_encoder
        weights = self._start_of(experiment.segmenter)[1]
        return models.build(experiment.segmenter, encoder, config, weights, pretrained)

    def _start_of(self, segmenter: str) -> tuple[str, str | None]:
        """Return the encoder that a segmenter starts from, and the file that the profile names for its weights."""
        name = models.encoder_of(segmenter, self.profile.segmenter_encoder)
        return name, self.profile.weights.get(name)

    def encoder_name(self, experiment: Experiment) -> str:
        """Return the encoder as tables name it; one that was not pretrained says so."""
        name = models.encoder_of(experiment.segmenter, self.profile.segmenter_encoder)
        start = self.trained(experiment).meta["initialised_from"]
        return name if start != RANDOM else f"{name} ({RANDOM})"

    def pseudo_config(self, experiment: Experiment) -> PseudoConfig:
        """Return how an experiment pseudo-labels: as its profile says.

        A segmenter that no mean teacher can teach gets rounds of pseudo labels that leave out what is unsure, by the
        teacher's measure of being sure.
        """
        config = self.profile.pseudo
        if config.method == "mean-teacher" and not models.teachable(experiment.segmenter):
            sure = max(config.confidence, config.teacher.sure)
            return replace(config, method="rounds", unsure="ignore", confidence=sure)
        return config

    def trained(self, experiment: Experiment, after: int = 0) -> Result:
        """Train the segmenter after so many rounds of pseudo labels, from the start each time (A35).

        ``model.safetensors`` holds the last weights, which all that follows uses, as in the paper; where an earlier
        validation was better, ``best.safetensors`` holds those of the best.

        With a mean teacher each round is a training that goes on from the model of the round before, on the annotated
        pairs and, beside them, on the training images without labels.
        """
        taught = self._taught(experiment, after)
        what, inputs = self._model_key(experiment, after)
        code = TEACHER_CODE if taught else MODEL_CODE
        return self.store.get("model", what, lambda folder: self._train(experiment, after, folder), inputs, code)

    def _taught(self, experiment: Experiment, after: int) -> bool:
        return after > 0 and self.pseudo_config(experiment).method == "mean-teacher"

    def _model_key(self, experiment: Experiment, after: int) -> tuple[dict, list[str]]:
        """Return the settings that a training depends on, and the keys of the results that it is made from."""
        taught = self._taught(experiment, after)
        inputs = [self.dataset.fingerprint]
        if experiment.supervision == "patches":
            inputs.append(self.selected(experiment).key)
        if experiment.augmentation in gan.REGISTRY:
            inputs.append(self.synthesised(experiment).key)
        if taught:
            inputs.append(self.trained(experiment, after - 1).key)
        elif after:
            inputs.append(self.pseudo_labelled(experiment, after).key)
        what = self.model_settings(experiment) | {"seed": experiment.seed, "device": self.device.type}
        start, weights = self._start_of(experiment.segmenter)
        if weights_file(start, weights) or start == self.profile.segmenter_encoder:
            what["weights"] = weights_version(start, weights)
        what |= {"teacher": self.pseudo_config(experiment).teacher, "round": after} if taught else {}
        return what, inputs

    def _train(self, experiment: Experiment, after: int, folder: Path) -> dict:
        """Train, write the weights and the curve into a folder, and return what the result says of itself."""
        began = time.time()
        name, augment = experiment.segmenter, self._augment(experiment)
        schedule, pseudo = self.profile.training_of(name), self.pseudo_config(experiment)
        taught = self._taught(experiment, after)
        groups = self._pairs(experiment, 0 if taught else after)
        torch.manual_seed(experiment.seed)  # the initial weights of the heads
        model, teacher = self.build(experiment).to(self.device), None
        if taught:
            model.load_state_dict(self.model(experiment, after - 1).state_dict())
            images = [model.prepare(sample.image) for sample in self.dataset.train]
            teacher = MeanTeacher(images, pseudo.teacher, schedule.batch, schedule.crop, augment, self.device)
            schedule = replace(schedule, ema=pseudo.teacher.decay)
        title = f"training {name}" + (f", round {after}" if after else "")
        checkpoint = Checkpoint(beside(folder, "state"), lambda: self.store.check_time("model"))
        with task(title, schedule.iterations) as progress:
            result = train(
                model,
                [pair for group in groups.values() for pair in group],
                schedule,
                seed=experiment.seed + (after if taught else 0),
                augment=augment,
                validate=self._validate if self.dataset.val else None,
                device=self.device,
                progress=progress.measured,
                pair_weights=self.profile.mix.weights({kind: len(group) for kind, group in groups.items()}),
                unlabelled=teacher,
                resume_from=checkpoint.read(),
                checkpoint=checkpoint,
            )
        save_file({k: v.contiguous().cpu() for k, v in model.state_dict().items()}, folder / "model.safetensors")
        (folder / "curve.json").write_text(json.dumps(result.curve))
        if result.best_iteration < schedule.iterations:
            save_file({k: v.contiguous() for k, v in result.best_state.items()}, folder / "best.safetensors")
        checkpoint.remove()
        return {
            "seconds": round(time.time() - began + result.seconds_before, 2),
            "validation_aji": result.curve[-1].get("val"),
            "best_iteration": result.best_iteration,
            "best_validation_aji": max((row["val"] for row in result.curve if "val" in row), default=None),
            "pairs": {kind: len(group) for kind, group in groups.items()},
            "peak_gpu_mb": result.peak_memory // 2**20 or None,
            "recorded_gpu_mb": result.recorded_memory // 2**20,
            "initialised_from": model.initialised_from,
            "kernels": kernels.available(self.device),
        }

    def _augment(self, experiment: Experiment) -> AugmentConfig | None:
        return None if experiment.augmentation == "none" else self.profile.augment

    def model_settings(self, experiment: Experiment) -> dict:
        """Return what the profile says of an experiment's segmenter and of its training."""
        name = experiment.segmenter
        return {
            "segmenter": (name, self.profile.segmenter(name), self.profile.segmenter_encoder),
            "training": (self.profile.training_of(name), self._augment(experiment), self.profile.mix),
        }

    def _pairs(self, experiment: Experiment, after: int) -> dict[str, list[Pair]]:
        """Return the training pairs by kind."""
        if experiment.supervision == "full":
            groups = {"real": [(sample.image, sample.labels) for sample in self.dataset.train]}
        else:
            groups = {"real": self.annotated(experiment)}
        if experiment.augmentation in gan.REGISTRY:
            groups["synthetic"] = self.synthetic(experiment)
        if after:
            groups["pseudo"] = self.pseudo(experiment, after)
        return groups

    def _validate(self, model: Segmenter) -> float:
        found = predict_all(model, [sample.image for sample in self.dataset.val])
        return float(
            np.mean([metrics.aji(s.labels, labels) for s, labels in zip(self.dataset.val, found, strict=True)])
        )

    def model(self, experiment: Experiment, after: int = 0) -> Segmenter:
        """Return the trained segmenter of an experiment."""
        model = self.build(experiment, pretrained=False)
        model.load_state_dict(load_file(self.trained(experiment, after).path / "model.safetensors"))
        return model.to(self.device).eval()

    def curve(self, experiment: Experiment, after: int = 0) -> pd.DataFrame:
        """Return the learning curve of a training: iteration, learning rate, total loss and its terms."""
        return pd.DataFrame(json.loads((self.trained(experiment, after).path / "curve.json").read_text()))

    def pseudo_labelled(self, experiment: Experiment, after: int) -> Result:
        """Label crops of the training images by the model of the round before (Sec. III-C, A34)."""
        config = self.pseudo_config(experiment)

        def make(folder: Path) -> dict:
            patches = self.selection(experiment).patches
            annotated = [
                [(p.row, p.col, p.size, sample.labels[p.slices]) for p in patches if p.image_id == sample.id]
                for sample in self.dataset.train
            ]
            images = [sample.image for sample in self.dataset.train]
            predict = self.model(experiment, after - 1).predict_instances
            with task(f"pseudo labels, round {after}"):
                made = pseudo_pairs(predict, images, annotated, config, experiment.seed + after)
            # One array each: of images smaller than a crop they differ in size. The pixels are cut out again when read:
            # compressing 600 crops takes longer than segmenting the images.
            arrays = {f"labels{i}": labels for i, (_, labels) in enumerate(made.pairs)}
            np.savez_compressed(folder / "crops.npz", positions=np.array(made.positions), **arrays)
            return {"kept": made.kept, "dropped": made.dropped}

        inputs = [self.trained(experiment, after - 1).key]
        what = {name: value for name, value in to_plain(config).items() if name not in ("method", "teacher")}
        return self.store.get("pseudo", (what, after, experiment.seed), make, inputs, PSEUDO_CODE)

    def pseudo(self, experiment: Experiment, after: int) -> list[Pair]:
        """Return the pseudo-labelled crops of round `after`, which take the place of those of the round before."""
        images, pairs = [sample.image for sample in self.dataset.train], []
        with np.load(self.pseudo_labelled(experiment, after).path / "crops.npz", allow_pickle=False) as arrays:
            for i, (number, row, col) in enumerate(arrays["positions"]):
                labels = arrays[f"labels{i}"]
                height, width = labels.shape
                pairs.append((images[number][row : row + height, col : col + width], labels))
        return pairs

    # -- numbers -----------------------------------------------------------------------------------------------

    def evaluated(self, experiment: Experiment, after: int = 0) -> Result:
        """Segment the test images: ``metrics.csv``, one line per image, and ``predictions.npz``, the label maps."""

        def make(folder: Path) -> dict:
            model = self.model(experiment, after)
            test, rows, predictions = self.dataset.measurable("test"), [], {}
            with task("test images", len(test)) as progress:
                found = predict_all(model, [sample.image for sample in test])
                for i, (sample, labels) in enumerate(zip(test, found, strict=True)):
                    predictions[f"labels{i}"] = labels.astype(np.min_scalar_type(int(labels.max(initial=0))))
                    scores = metrics.evaluate(sample.labels, labels)
                    rows.append({"image_id": sample.id, "organ": sample.organ, "seen": int(sample.seen), **scores})
                    progress.update(i + 1)
            pd.DataFrame(rows).to_csv(folder / "metrics.csv", index=False)
            ids = np.array([sample.id for sample in test])  # any name may be an image's
            np.savez_compressed(folder / "predictions.npz", ids=ids, **predictions)
            return {"aji": float(np.mean([row["aji"] for row in rows]))}

        return self.store.get("evaluation", {}, make, [self.trained(experiment, after).key], EVALUATION_CODE)

    def predictions(self, experiment: Experiment, after: int = 0) -> dict[str, np.ndarray]:
        """Return the label map that an experiment predicts for each test image, by image id."""
        with np.load(self.evaluated(experiment, after).path / "predictions.npz", allow_pickle=False) as arrays:
            return {str(name): arrays[f"labels{i}"].astype(np.int32) for i, name in enumerate(arrays["ids"])}

    def scores(self, experiment: Experiment, after: int = 0) -> pd.DataFrame:
        """Return what an experiment measured on each test image."""
        path = self.evaluated(experiment, after).path / "metrics.csv"
        return pd.read_csv(path, dtype={"image_id": str, "organ": str}, keep_default_na=False)
