"""Fill a new engine: fresh weights, a checkpoint, a Hugging Face folder, or LoRA factors beside a base model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megalite.checkpoint import folder as folders
from megalite.checkpoint.contents import config_of, is_adapter, new_rows
from megalite.checkpoint.load import load as load_tensors
from megalite.checkpoint.load import read_tensor
from megalite.checkpoint.manifest import Damaged
from megalite.checkpoint.state import State, state_from
from megalite.config import Resolved
from megalite.config.parameters import is_factor
from megalite.engine.engine import Engine
from megalite.exchange.base import find_base, is_hf, name_of
from megalite.exchange.hf_folder import open_folder
from megalite.exchange.hf_weights import fill, placeholder, read_whole
from megalite.model.init import draw
from megalite.optim.loss_scale import first_scale
from megalite.parallel.groups import share_text

# parameters with a row for each token
VOCABULARY = ("embed.weight", "loss_head.head.weight")


def first_values(config: Resolved) -> Callable[[str, tuple[int, ...]], Tensor] | None:
    """The function by which `build` initialises parameters if weights are read later; None: it draws all of them."""
    if config.model.from_hf is None and config.tune.mode != "lora":
        return None
    return lambda name, shape: (
        draw(name, shape, config.model, config.train.seed) if is_factor(name) else placeholder(name, shape)
    )


def first_state(
    engine: Engine, data: str, resume: Path | None, say: Callable[[str], None]
) -> tuple[Path | None, State]:
    """Fill the engine as its configuration says. Returns the checkpoint loaded, if any, and the run's state.

    `data`: fingerprint of the training data. `resume`: the run's own checkpoint to resume from; if it is damaged, older
    ones are tried. Raises ValueError if none can be loaded. Collective.
    """
    config = engine.config
    state = State(data=data, loss_scale=first_scale(config))
    source = resume or (folders.find(config.checkpoint.load) if config.checkpoint.load else None)
    if config.tune.mode == "lora":
        base = find_base(config, source)
        load_base(engine, base)
        state.base = name_of(base)
        say(f"adapters for the weights of {base}")
        source = source if source is not None and is_adapter(folders.read_manifest(source)) else None
    if source is not None:
        whole = resume is not None or config.checkpoint.load_optim
        older = folders.before(resume) if resume is not None else []
        new = range(0)
        if resume is None:
            new = new_rows(config, config_of(folders.read_manifest(source)).model.add_tokens)
        source, state = _load_first_good(engine, [source, *older], state, whole, say, new)
        say(f"loaded {source}" + (f", at step {state.step}" if whole else ", weights only"))
        if whole and state.data != data:
            say(f"note: the data was {state.data} and is now {data}; the order of samples changes")
            state.data = data
    elif config.model.from_hf is not None and config.tune.mode != "lora":
        folder, new = open_folder(config.model.from_hf), new_rows(config, ())
        parameters = engine.stored()
        add_rows(engine, parameters, new, lambda name: read_whole(folder, name))
        fill(parameters, engine.shards, folder)
        engine.optimizer.adopt()
        say(f"loaded {config.model.from_hf}")
    return source, state


def _load_first_good(
    engine: Engine, candidates: Sequence[Path], state: State, whole: bool, say: Callable[[str], None], new: range
) -> tuple[Path, State]:
    """Load the first of `candidates` that no rank finds damaged, so that all ranks load the same one.

    Raises Damaged, naming each, if all are damaged. Other errors are raised at once, on every rank.
    """
    world, found = engine.mesh.world, []
    for folder in candidates:
        damage = mistake = None
        try:
            loaded = load(engine, folder, state, whole, new)
        except Damaged as error:
            damage = str(error)
        except ValueError as error:
            mistake = str(error)
        if mistake := share_text(world, mistake, engine.mesh.device):
            raise ValueError(mistake)
        damage = share_text(world, damage, engine.mesh.device)
        if damage is None:
            return folder, loaded
        say(f"note: {damage}")
        found.append(damage)
    raise Damaged(found[0] if len(found) == 1 else f"no checkpoint can be loaded: {'; '.join(found)}")


def add_rows(engine: Engine, parameters: dict[str, Tensor], new: range, read: Callable[[str], Tensor]) -> None:
    """Fill the embedding and the head, remove them from `parameters`, and set each of the `new` rows to the mean row.

    `read(name)`: a whole parameter without the new rows. Does nothing if `new` is empty.
    """
    for name in [name for name in VOCABULARY if new and name in parameters]:
        parameter, shard, old = parameters.pop(name), engine.shards[name], read(name)
        rows = old.new_zeros(shard.whole_shape)
        rows[: len(old)] = old
        rows[new.start : new.stop] = old[: new.start].double().mean(0).to(old.dtype)
        with torch.no_grad():
            parameter.copy_(shard.cut(rows))


def load(engine: Engine, folder: Path, state: State, whole: bool, new: range = range(0)) -> State:
    """Fill the engine from a checkpoint. Returns the state to continue with.

    `whole`: weights, optimizer and state; else the weights only, and `state` is returned. `new`: rows of the vocabulary
    that the checkpoint lacks. Raises ValueError if it holds another model, Damaged if it is damaged.
    """
    manifest = folders.read_manifest(folder)
    folders.check_model(manifest, dataclasses.asdict(engine.config.model), folder, grows=bool(new))
    kept = state_from(manifest) if whole else state
    verify = engine.config.checkpoint.verify
    parameters = engine.stored()
    add_rows(engine, parameters, new, lambda name: read_tensor(folder, manifest, f"weight.{name}", verify))
    load_tensors(folder, manifest, engine.shards, {"weight": parameters}, verify=verify)
    engine.optimizer.adopt()
    if not whole:
        return state
    kinds = engine.optimizer.state()
    if "master" in kinds and not any(name.startswith("master.") for name in manifest["tensors"]):
        kinds.pop("master")  # saved in full precision: the weights just adopted are the masters
    load_tensors(folder, manifest, engine.shards, kinds, engine.grads.spans, verify)
    engine.optimizer.set_step(kept.step - kept.skipped_steps)
    return dataclasses.replace(kept, base=state.base)


def load_base(engine: Engine, base: Path) -> None:
    """Fill the frozen weights under LoRA factors from a checkpoint or a Hugging Face folder."""
    if is_hf(base):
        fill(engine.base(), engine.shards, open_folder(base))
    else:
        manifest = folders.read_manifest(base)
        folders.check_model(manifest, dataclasses.asdict(engine.config.model), base)
        verify = engine.config.checkpoint.verify
        load_tensors(base, manifest, engine.shards, {"weight": engine.base()}, verify=verify)
