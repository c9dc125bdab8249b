"""Exports a trained model as a folder that can be given away: weights, config.json and a model card.

    python -m scripts.export runs/digits/2_rf model_zoo/digits_2seqrf --name "2-SeqRF on digits"

RUN is a run's folder, one of its stages or checkpoints, or an exported model. OUT holds model.safetensors (the EMA of
the weights; --full: the weights and Adam's moments too), config.json, README.md and samples.png, laid out as model hubs
expect it; nothing is uploaded. The card takes its numbers from the metrics.json of evaluations: those in RUN's workdir,
or given by --metrics, that measured these very weights. Exit status 2 and one line if RUN is no model.

    sampler.load("model_zoo/digits_2seqrf").sample(16)    # Python
    --config.training.import_flax=model_zoo/digits_2seqrf # main.py
"""

import argparse
import json
import pathlib
import sys
from typing import Any

import sampler
from checkpointing import exported
from checkpointing.checkpoint import checkpoint_at
from jobs.lock import exclusive
from jobs.stages import stage_in
from models.weights import fingerprint
from report.results import markdown_table
from tracking import plots
from utils import InputError, atomic_path, local_path, valid_json

PAPER = "https://arxiv.org/abs/2402.06461"
ADAPTIVE = {"tol": 1e-3}


def model_name(metadata: dict[str, Any]) -> str:
    """What the paper calls a model: '1-RF', '2-SeqRF', '2-SeqRF-Distill'."""
    stage, k = stage_in(metadata["stage"]), metadata["k"]
    if stage is None:
        return "1-RF" if k == 1 else f"{k}-SeqRF"
    return stage.model_name(k)


def source_name(source: str) -> str:
    """Where a model started from, without this machine's path: run and step, 'k4/2_rf, step 450', or the last part."""
    path = pathlib.PurePath(source)
    if path.parent.name == "checkpoints":
        run = pathlib.PurePath(*path.parts[-4:-2])
        return f"{run.as_posix()}, step {path.name}"
    is_named = ", step " in source  # of a model that was exported before
    return source if is_named else (path.parent if path.name == exported.WEIGHTS else path).name


def recommended_samplers(metadata: dict[str, Any]) -> list[dict[str, Any]]:
    """Keywords of `sampler.TrainedSampler.sample`, the first the one to begin with: few steps of a straight flow."""
    stage, k = stage_in(metadata["stage"]), metadata["k"]
    if stage is not None and stage.distills:
        return [{"num_scales": k * stage.steps}]
    if stage is not None and stage.phase == 2:
        return [{"num_scales": 2 * k}, {"num_scales": k}, ADAPTIVE]
    return [ADAPTIVE, {"num_scales": 20, "predictor": "rf_solver_heun"}]


def measured(run: pathlib.Path, given: list[pathlib.Path], fingerprint: str) -> list[dict[str, Any]]:
    """The contents of metrics.json files that measured these weights: in RUN's workdir, and those given.

    Raises:
      InputError: one that was given measured other weights.
    """
    workdir = next((f for f in (run, *run.resolve().parents[:3]) if any(f.glob("*/step_*/metrics.json"))), None)
    found = sorted(workdir.glob("*/step_*/metrics.json")) if workdir else []
    values = {path: valid_json(path, Any) for path in [*given, *found]}

    def is_ours(entry: Any) -> bool:
        settings = entry.get("settings") if isinstance(entry, dict) else None
        return isinstance(settings, dict) and settings.get("weights") == fingerprint

    for path in given:
        if not is_ours(values[path]):
            raise InputError(f"{path} is no metrics.json of these weights (fingerprint {fingerprint})")
    ours = [entry for entry in values.values() if is_ours(entry)]
    return sorted(ours, key=lambda entry: (entry.get("sampler") != "ODE", entry.get("nfe") or 0))


def metrics_tables(metrics: list[dict[str, Any]]) -> str:
    """Markdown: a table of the evaluations that were measured alike and below it how; one for each way."""
    alike: dict[str, list[dict[str, Any]]] = {}
    for entry in metrics:
        alike.setdefault(_how_measured(entry), []).append(entry)
    return "\n\n".join(f"{_table(entries)}\n\n{how}" for how, entries in alike.items())


def _quality(entry: dict[str, Any]) -> str:
    return next((name for name in entry if name.startswith("fid")), "fid")


def _how_measured(entry: dict[str, Any]) -> str:
    quality, settings = _quality(entry), entry["settings"]
    return (
        f"Measured with `main.py --mode=eval`: {quality} between {settings.get('num_samples')} samples and the "
        f"{settings.get('data')} data, features of {settings.get('network')}; straightness and truncation error over "
        f"{settings.get('straightness_samples')} noises; seed {settings.get('seed')}, batches of "
        f"{settings.get('batch_size')} on {settings.get('devices')}. `{quality}` of another network is not comparable."
    )


def _table(metrics: list[dict[str, Any]]) -> str:
    columns = ["nfe", _quality(metrics[0]), "straightness", "sequential_straightness", "truncation_error"]
    values = [[entry.get(name) for name in columns] for entry in metrics]
    rows = [["-" if value is None else f"{value:.4g}" for value in row] for row in values]
    samplers = [str(entry.get("sampler")) for entry in metrics]
    return markdown_table([["sampler", *columns], *([name, *row] for name, row in zip(samplers, rows, strict=True))])


def card(metadata: dict[str, Any], metrics: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """The model card: YAML front matter as huggingface_hub reads it, then Markdown."""
    name, folder = options.name, options.out.name if options.out.is_absolute() else options.out.as_posix()
    data = options.data or next((entry["settings"].get("data") for entry in metrics), "images that were not named")
    size, channels = metadata["data"]["image_size"], metadata["data"]["num_channels"]
    first = ", ".join(f"{key}={value!r}" for key, value in recommended_samplers(metadata)[0].items())
    boundaries = ", ".join(f"{b:.4g}" for b in metadata["boundaries"])
    commands = "\n".join(options.command)
    front = {
        "license": options.license,
        "library_name": "seqrf",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["rectified-flow", "seqrf", "flow-matching", "jax", "flax"],
    }
    front_matter = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items())  # JSON is YAML
    picture = "\n![samples](samples.png)\n" if options.images else ""
    return f"""---
{front_matter}
---

# {name}

A {model_name(metadata)} flow from noise to images of {size} x {size} x {channels}.
Trained on {data}, {metadata["step"]} updates; its segments lie between t = {boundaries} (1: noise, 0: data).
The method is [sequential rectified flow]({PAPER}).
{picture}
## Use

With SeqRF's repository as the working directory:

```python
import sampler

model = sampler.load("{folder}")
images = model.sample(16, seed=0, {first})  # [16, {size}, {size}, {channels}] in [0, 1]
```

`config.json` describes the network, the clock and the recommended samplers.
`--config.training.import_flax={folder}` starts a training, a generation of pairs or an evaluation from it.

## Training

Stage `{metadata["stage"]}`{f", started from `{metadata['source']}`" if metadata.get("source") else ""}.
{f"{chr(10)}```bash{chr(10)}{commands}{chr(10)}```{chr(10)}" if commands else ""}
## Metrics

{metrics_tables(metrics) if metrics else "None were given."}

## Licence

{options.license}; the training data have their own.
"""


def export(options: argparse.Namespace) -> None:
    """Writes the folder. Raises InputError where RUN is no model or OUT is something else."""
    out = options.out
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / exported.WEIGHTS).is_file())):
        raise InputError(f"{out} exists and holds something else; name a new folder")
    checkpoint = checkpoint_at(options.run, ema_rate=options.ema_rate)
    metadata, weights = dict(checkpoint.metadata), checkpoint.load()
    metadata["source"] = source_name(metadata.get("source") or "")
    metrics = measured(options.run, options.metrics, fingerprint(weights.ema_params))
    samplers = recommended_samplers(metadata)
    options.name = options.name or model_name(metadata)
    exported.write_folder(out, weights, metadata, full=options.full, samplers=samplers)
    if options.images:
        plots.draw_images(out / "samples.png", sampler.load(out).sample(options.images, **samplers[0]))
    with atomic_path(out / exported.CARD) as temporary:
        temporary.write_text(card({**metadata, "step": int(weights.step)}, metrics, options))
    print(f"wrote {out}: {options.name}, update {int(weights.step)}, {len(metrics)} evaluations in its card")


def main(arguments: list[str] | None = None) -> int:
    """The script; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=local_path, help="a run's folder, stage or checkpoint, or an exported model")
    parser.add_argument("out", type=local_path, help="the folder to write")
    parser.add_argument("--full", action="store_true", help="also the raw weights and Adam's moments")
    parser.add_argument("--ema_rate", type=float, default=0.0, help="export this one of model.ema_rates")
    parser.add_argument("--name", default="", help="the card's title")
    parser.add_argument("--data", default="", help="what it was trained on; default: as its evaluations say")
    parser.add_argument("--command", action="append", default=[], help="a command that trained it; may be repeated")
    parser.add_argument("--metrics", action="append", default=[], type=local_path, help="a metrics.json of it")
    parser.add_argument("--license", default="apache-2.0", help="of the weights, as model hubs name it")
    parser.add_argument("--images", type=int, default=16, help="samples in the card's picture; 0: no picture")
    options = parser.parse_args(arguments)
    try:
        with exclusive(options.out):
            export(options)
    except (InputError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
