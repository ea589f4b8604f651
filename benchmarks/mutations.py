"""Break the code on purpose, one place at a time, and see whether a quick test fails.

    python benchmarks/mutations.py [--only PATTERN] [--list]

Works on a copy of the repository. Each line of the table below is a break: its name, the text that is replaced (exactly
once in its file; a text that is not there any more is an error), what takes its place, and, where they differ from the
room's, the tests that must notice. Prints a Markdown table as it goes; the status is 1 where a break is not noticed.
The unbroken copy must pass first.
"""

from __future__ import annotations

import argparse
import fnmatch
import multiprocessing
import os
import re
import shlex
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]
SECONDS = 300  # a break whose tests take longer is not noticed
SERVER = multiprocessing.get_context("forkserver")  # has imported what takes long, and nothing of ours
PRELOADED = ["torch", "timm", "deepspeed.runtime.zero.muon.muon_optimizer", "scipy.sparse", "pandas", "pyarrow.parquet"]
PRELOADED += ["optuna", "mlflow", "nvidia.dali.fn", "cv2", "typer", "pytest"]
LEFT_OUT = (".git", ".venv", "__pycache__", ".pytest_cache", ".ruff_cache", "runs", "mlruns", "*.egg-info", "build")


class Break(NamedTuple):
    """One deliberate mistake."""

    name: str
    file: str
    old: str
    new: str
    tests: str  # pytest's arguments


def room(file: str, tests: str, *breaks: tuple[str, ...]) -> list[Break]:
    """The breaks of one file: (name, old text, new text[, tests])."""
    return [Break(name, file, old, new, *(own or [tests])) for name, old, new, *own in breaks]


RECIPE, ONE_RANK = "tests/test_published_recipe.py", "tests/test_training_one_rank.py"
LOSSES, MODEL = "tests/test_losses.py", "tests/test_model_exact.py tests/test_model_machinery.py"
ALIGNED, PLAN, READERS = "tests/test_model_aligned.py", "tests/test_plan.py", "tests/test_readers.py"
SHARE = "tests/test_share.py"
LANES, WINDOWS = "tests/test_plan_lanes.py", "tests/test_plan_windows.py"
APPEND, VERIFY = "tests/test_shards_append.py", "tests/test_shards_verify.py -k 'another or card or index'"
FORMAT = "tests/test_shards_format.py"
CLASSES = "tests/test_sharded_classes.py"
BY_CLASSES = f"{CLASSES} -k 'not together_are_one'"  # on one rank
PROTOCOLS, DISTANCE = "tests/test_evaluation_protocols.py", "tests/test_evaluation_distance.py"
REMOTE, RANGES, OPEN_FILES = "tests/test_shards_remote.py", "tests/test_shards_ranges.py", "tests/test_open_files.py"
COUNTING = "tests/test_evaluation_counting.py"
PARTS = "tests/test_checkpoint_parts.py"
PARTS_WRITTEN = f"{PARTS} -k 'wrote or written'"
FEATURES, CHECKPOINTS = "tests/test_evaluation_features.py", "tests/test_training_checkpoints.py"

BREAKS = [
    # ------------------------------------------------------------------ the recipe's values and where they are used
    *room(
        "keyreid/config.py",
        f"{RECIPE} -k configurations",
        ("alpha .5", "alpha: float = Field(0.75,", "alpha: float = Field(0.5,"),
        ("label smoothing 0 by default", "label_smoothing: float = Field(0.1,", "label_smoothing: float = Field(0.0,"),
        ("a margin of .3", "triplet_margin: float | None = Field(None,", "triplet_margin: float | None = Field(0.3,"),
        ("centre loss ten times", "centre: float = Field(5e-4,", "centre: float = Field(5e-3,"),
        ("no erasing", "erase_probability: float = Field(0.5,", "erase_probability: float = Field(0.0,"),
        ("stochastic depth 0", "drop_path: float = Field(0.1,", "drop_path: float = Field(0.0,"),
        ("TCSS shifts 5", "shift: int = Field(4,", "shift: int = Field(5,"),
        ("floor 0", "floor_lr: float = Field(1.6e-5,", "floor_lr: float = Field(0.0,"),
        ("batches of 2 tracklets", "tracklets: int = Field(4,", "tracklets: int = Field(2,"),
    ),
    *room(
        "configs/mars.yaml",
        f"{RECIPE} -k configurations",
        ("mars.yaml: momentum .99", "momentum: 0.9,", "momentum: 0.99,"),
        ("mars.yaml: 60 epochs", "epochs: 120,", "epochs: 60,"),
    ),
    *room(
        "keyreid/training/schedule.py",
        f"{RECIPE} -k 'rates or momentum'",
        ("warm-up dropped", "warmup_t=schedule.warmup_epochs * steps_per_epoch", "warmup_t=0"),
        ("warm-up from 0", "warmup_lr_init=min(schedule.warmup_lr, lr)", "warmup_lr_init=0.0"),
        ("no floor", "lr_min=min(schedule.floor_lr, lr)", "lr_min=0.0"),
        ("cosine over half the run", "t_initial=schedule.epochs * steps", "t_initial=schedule.epochs // 2 * steps"),
        ("bias rate factor 1", '"lr_scale": config.bias_lr_factor', '"lr_scale": 1.0'),
        ("biases among the weights", 'name.endswith("bias")', 'name.startswith("bias")'),
        ("momentum .1", "momentum=config.momentum", "momentum=0.1"),
        ("no weight decay", "momentum=config.momentum, weight_decay=config.weight_decay", "momentum=config.momentum"),
    ),
    # ------------------------------------------------------------------------------------------------------ training
    *room(
        "keyreid/training/loop.py",
        ONE_RANK,
        ("schedule never stepped", "self.schedule.step_update(step)", "pass", f"{RECIPE} -k rates"),
        ("the average never updated", "self.average.update()", "pass"),
        (
            "a resumed reader starts anew",
            "self.plan.batches(epoch, step, ranks.rank",
            "self.plan.batches(0, 0, ranks.rank",
        ),
        ("each rank its own initial weights", "torch.manual_seed(config.seed)", "torch.seed()"),
        ("bad steps for ever", "if self._bad_in_a_row < self.config", "if True or self._bad_in_a_row < self.config"),
        ("judged without the average", "if whole and self.average is None", "if whole"),
    ),
    *room(
        "keyreid/training/snapshot.py",
        ONE_RANK,
        ("momenta not resumed", "engine.restore_optimizer_states(partial(saved.read, TRAINING))", "pass"),
        ("the average not resumed", "_restore(saved, EMA if known else WEIGHTS, held)", "pass"),
        ("the loss scale not resumed", "engine.restore_loss_scale(restored.state.loss_scale)", "pass"),
        ("centres not resumed", "_restore(restored.saved, TRAINING, same)", "pass"),
        ("weights not resumed", "_restore(restored.saved, WEIGHTS, held)", "pass"),
    ),
    *room(
        "keyreid/training/step.py",
        f"{RECIPE} {ONE_RANK}",
        (
            "centres never updated by the step",
            "criterion.update_centres(*scope)",
            "pass",
        ),
        (
            "losses do not know what is seen",
            "visibility = batch.visibility if used else None",
            "visibility = None",
        ),
        (
            "nothing is erased for the losses",
            "Targets(batch.labels, batch.erased,",
            "Targets(batch.labels, batch.erased * 0,",
        ),
        ("bad statistics stay", "network.restore_statistics(before)", "pass"),
        ("the last micro-batch has no gradient", "for piece in pieces:", "for piece in pieces[:-1]:"),
        ("gradients of the first micro-batch for all", "rows = _rows(gradients, start,", "rows = _rows(gradients, 0,"),
        ("gradients scaled twice", "leaf.grad / scale", "leaf.grad"),
        ("labels are not checked", "check_labels(batch.labels, network", "(lambda *_: None)(batch.labels, network"),
    ),
    *room(
        "keyreid/training/engine.py",
        ONE_RANK,
        ("gradients are not clipped", "clip_grad_norm_(parameters, self._limit)", "clip_grad_norm_(parameters, 1e9)"),
        ("the average takes the newest", "current, 1 - self.decay)", "current, self.decay)"),
        ("the loss scale is 1", "return self._deepspeed.torch_autocast_z0_gradscaler.get_scale()", "return 1.0"),
    ),
    *room(
        "keyreid/training/engine_config.py",
        "tests/test_training_engine_config.py",
        ("ZeRO is not told to clip", "training.clip_gradient_norm if training.zero_stage else 0.0", "0.0"),
        ("fp16 for bf16", '{"bf16": "torch.bfloat16"', '{"bf16": "torch.float16"'),
    ),
    *room(
        "keyreid/training/stochastic_depth.py",
        ONE_RANK,
        ("the same paths dropped in each step", "seed * 1_000_003 + step", "seed * 1_000_003"),
        ("kept paths are not scaled", ".float() / (1 - path.probability)", ".float()"),
        ("dropped for kept", ">= path.probability", "< path.probability"),
    ),
    # -------------------------------------------------------------------------------------------------------- losses
    *room(
        "keyreid/losses.py",
        LOSSES,
        ("label smoothing 0", "label_smoothing=smoothing,", "label_smoothing=0.0,", f"{RECIPE} -k minimised"),
        ("alpha for the parts", "(1 - alpha) * self._weighted(of_parts)", "alpha * self._weighted(of_parts)"),
        ("parts are summed", "{name: term.mean() for", "{name: term.sum() for"),
        ("no attention loss", "(full(scores) * erased).sum(1)", "(full(scores) * 0).sum(1)"),
        ("attention by the mean over frames", "* erased).sum(1))", "* erased).mean(1))"),
        (
            "clips that never show a part count",
            "len(part_table) if visibility is None else",
            "len(part_table) if True else",
            f"{RECIPE} -k minimised",
        ),
        (
            "centres move away",
            "table, clips - centre[places], places",
            "table, centre[places] - clips, places",
        ),
        ("centres move by the sum", "rate * seen / (1 + count)", "rate * seen"),
        (
            "distance to the centre, not its square",
            "F.mse_loss(full(features)",
            "F.l1_loss(full(features)",
        ),
    ),
    *room(
        "keyreid/triplet.py",
        LOSSES,
        ("easiest positive", "squared, same, sign=1)", "squared, same, sign=-1)"),
        ("farthest negative", "squared, other, sign=-1)", "squared, other, sign=1)"),
        ("margin's sign", "(violation + margin)", "(violation - margin)"),
        (
            "positive and negative swapped",
            "return positive - distance[..., 1].masked_fill(~other.any(-1), torch.inf)",
            "return distance[..., 1].masked_fill(~other.any(-1), torch.inf) - positive",
        ),
        ("Manhattan distance", 'compute_mode="donot_use_mm_for_euclid_dist"', "p=1.0"),
        (
            "unseen clips are negatives",
            "& present.unsqueeze(-2), ~same & present.unsqueeze(-2)",
            "& present.unsqueeze(-2), ~same",
        ),
        ("no gradient from those who chose a row", "(all_pulls * mine)", "(all_pulls * 0)", SHARE),
        (
            "no gradient from those whom a row chose",
            "pulls.double(), accumulate",
            "0 * pulls.double(), accumulate",
            SHARE,
        ),
        ("a scope's first rows for all ranks", "first = share.first(rows)", "first = 0", SHARE),
        ("equal clips pull without end", "torch.where(distance > 0, sides / distance, 0.0)", "sides / distance", SHARE),
        ("own weights for the batch's", "share.seen[branch].clamp(min=1e-6)", "counted.sum()", SHARE),
    ),
    *room(
        "keyreid/distributed/share.py",
        SHARE,
        ("means of own clips", "return values.sum(-1) / self.clips if", "return values.mean(-1) if"),
        ("no gradient of sums", "dist.all_reduce(gradient :=", "(gradient :="),
        ("each rank's whole loss", "* share / self.size", "* share"),
        ("a part of the gradient", "(self.size - 1) * (own - own.detach())", "0"),
        (
            "lanes side by side compare",
            "for part in torch.arange(len(labels)).chunk(self.scopes)",
            "for part in [torch.arange(len(labels))]",
        ),
        ("any ranks and lanes", "if scopes % ranks and ranks % scopes", "if False"),
    ),
    *room(
        "keyreid/training/costs.py",
        "tests/test_costs.py",
        ("no gradients of sums are counted", "*gathered, *pairs, *sums]", "*gathered, *pairs]"),
        ("features travel in float32", "wire = 2 if", "wire = 4 if"),
        ("too few copies of own rows", '"own rows": 6 *', '"own rows": 2 *'),
        ("accumulation spares nothing", "clips // micro if whole else clips", "clips"),
    ),
    *room(
        "keyreid/shards/members.py",
        "tests/test_shards_forged.py -k half",
        ("half characters are read", '    if b"\\\\u" in', '    if False and b"\\\\u" in'),
    ),
    # ------------------------------------------------------------------------------------------------ sharded classes
    *room(
        "keyreid/model/sharded_classes.py",
        f"{CLASSES} -k 'together_are_one or draw or refused or drawn'",
        ("each rank's own largest logit", "_reduce(largest, group, dist.ReduceOp.MAX)", "pass"),
        ("a softmax over own classes", "_reduce(sums, group)", "pass"),
        ("smoothing over own classes", "smoothing * everything / count", "smoothing * everything / classes"),
        ("no smoothing in the gradient", "slopes -= (ctx.smoothing / count * gradient).unsqueeze(1)", "pass"),
        ("the label's class is any", "slopes.scatter_add_(1, at,", "slopes.scatter_add_(1, at * 0,"),
        ("each rank has each label", "logits.gather(1, at)[:, 0] * owned", "logits.gather(1, at)[:, 0]"),
        ("every clip is right", "(of_label >= largest)", "(of_label >= -largest.abs())"),
        ("only own labels are seen", "self.group.place, gather(labels)", "self.group.place, labels"),
        ("classes are drawn by their place", "_uniform(own, key)", "_uniform(own // place.world_size, key)"),
        ("each step draws the same", "+ key % 2**64", "+ 1"),
        ("classifiers start wide, sharded", "normal_(std=0.001)", "normal_(std=0.01)"),
        ("a group of any size", "if world % size:", "if False:"),
        ("every group saves", "group.number, group.ranks // place.world_size)", "0, 1)"),
    ),
    *room(
        "keyreid/distributed/owned_rows.py",
        f"{CLASSES} -k together_are_one",
        (
            "each rank makes the whole table",
            "torch.empty(tables, len(range(ranks.rank, rows, ranks.world_size)), width, device=device)",
            "torch.empty(tables, rows, width)[:, ranks.rank :: ranks.world_size].clone()",
        ),
    ),
    *room(
        "keyreid/distributed/parts.py",
        f"{PARTS} -k common",
        ("rows of another rank", "row % self.every == self.first", "row % self.every >= self.first"),
        ("a table begins where the last ends", "table * self.shape[-2] + self.first", "table * self.shape[-2]"),
        ("runs cut within a row", "self.start, self.stop, other.start, other.stop)", "self.start, self.stop)"),
        ("parts that meet are not found", "if not len(self) or not len(other)", "if self.every != other.every"),
        (
            "the first rank saves all",
            "total[alike] * number // each.of",
            "total[alike] * (number > 0)",
            f"{PARTS} -k evenly",
        ),
    ),
    *room(
        "keyreid/training/class_optimizer.py",
        CLASSES,
        ("gradients times the ranks", "parameter.grad /= group.ranks", "pass"),
        ("groups go apart", "if group.between is not None:", "if False:"),
        ("the norm of own classes", "if group.peers is not None:", "if False:"),
        ("classes at the first rate", "= self._of_engine.param_groups[0]", "= self._of_engine.defaults"),
        ("classes at a rate of their own", 'group["lr"] = self', "_ = self"),
        ("gradients of classes add up", "        self._optimizer.zero_grad()", "        pass"),
        ("momenta of classes are of another name", "network.{name}/{key}", "network.{name}/{key}s"),
    ),
    *room(
        "keyreid/training/engine.py",
        BY_CLASSES,
        ("a discarded step leaves the classes' gradients", "            self.classes.discard()", "            pass"),
        ("classes are not trained", "            self.classes.step()", "            self.classes.discard()"),
        ("classes are not clipped", "[*parameters, *self.classes.parameters], self._limit", "parameters, self._limit"),
        ("a norm without the classes", "return norm if self.classes is None else", "return norm if True else"),
    ),
    *room(
        "keyreid/training/engine_config.py",
        f"{CLASSES} -k together",
        ("sharded classes at ZeRO 3", 'training.zero_stage == 3, "gathers', 'False, "gathers'),
        ("sharded classes in fp16", 'training.precision == "fp16", "looks', 'False, "looks'),
        ("sharded classes, cast", 'cast, "keeps', 'False, "keeps'),
        ("clipped without the classes", "training.clip_gradient_norm and training.zero_stage,", "False,"),
        ("negatives of replicated classes", "config.loss.negative_classes < 1,", "False,"),
    ),
    *room(
        "keyreid/training/snapshot.py",
        BY_CLASSES,
        (
            "classes are not resumed",
            "_restore(restored.saved, WEIGHTS, held)",
            "_restore(restored.saved, WEIGHTS, _held_network(network))",
        ),
        ("classes have to have an average", "if (name in averages) == known}", "if known}"),
    ),
    *room(
        "keyreid/checkpoints/start.py",
        BY_CLASSES,
        ("no classifiers of another run", "        network.classes.load(apart)", "        pass"),
        ("classifiers make a network", "whole = NECK in state", "whole = CLASSIFIERS[0] in state"),
    ),
    # --------------------------------------------------------------------------------------------------------- model
    *room(
        "keyreid/model/single_query.py",
        "tests/test_model_exact.py",
        ("attention scale 1 / d", "query.shape[-1] ** -0.5", "query.shape[-1] ** -1.0"),
        (
            "no residual of the attention",
            "x[:, :1].expand(-1, parts, -1).flatten(0, 1) + self.drop_path1",
            "self.drop_path1",
        ),
        ("no residual of the MLP", "token = token + self.drop_path2", "token = self.drop_path2"),
        ("no bias of the values", ".reshape(*mixed.shape[:2], -1) + v_bias", ".reshape(*mixed.shape[:2], -1)"),
        ("no bias of the norm", "* full(self.norm_weight) + full(self.norm_bias)", "* full(self.norm_weight)"),
        (
            "guidance also for the token",
            "F.pad(full(log_weight), (1, 0))",
            "F.pad(full(log_weight), (1, 0), value=-1.0)",
        ),
        (
            "layer scale left out",
            "own.ls1, own.ls2 = block.ls1, block.ls2",
            "pass",
            "tests/test_model_weights.py -k backbones",
        ),
    ),
    *room(
        "keyreid/model/heads.py",
        f"{MODEL} -k 'exact or same_numbers or network'",
        (
            "the necks' bias is learnt",
            "self.bias.requires_grad_(False)",
            "self.bias.requires_grad_(True)",
            f"{RECIPE} -k network",
        ),
        ("classifiers start wide", "std=0.001", "std=1.0", f"{RECIPE} -k network"),
        ("necks never normalise by the batch", "*learnt, self.training,", "*learnt, False,"),
    ),
    *room(
        "keyreid/model/keyreid.py",
        "tests/test_model_exact.py",
        (
            "parts of the vector not divided",
            "self.part_necks(features.part_features) / self.parts",
            "self.part_necks(features.part_features)",
        ),
        (
            "parts' features without their neck",
            "self.part_classifiers(self.part_necks(features.part_features, share))",
            "self.part_classifiers(features.part_features)",
        ),
    ),
    *room(
        "keyreid/model/global_branch.py",
        "tests/test_model_exact.py",
        ("attention over time cut off", "scores.softmax(-1)", "scores.detach().softmax(-1)"),
        ("frames averaged", "(scores.softmax(-1).unsqueeze(-1) *", "((scores * 0).softmax(-1).unsqueeze(-1) *"),
    ),
    *room(
        "keyreid/model/local_branch.py",
        ALIGNED,
        (
            "guidance by the largest frame",
            "full(guidance).mean(1)",
            "full(guidance).amax(1)",
            "tests/test_model_exact.py",
        ),
        ("TCSS shifts the other way", "order.roll(-tcss.shift)", "order.roll(tcss.shift)"),
        ("TCSS does not interleave", "order.view(tcss.groups, -1).T.flatten()", "order"),
        ("TCSS cannot be switched off", "if not tcss.enabled:", "if False:"),
    ),
    *room(
        "keyreid/model/inputs.py",
        "tests/test_model_machinery.py -k prepare",
        ("pictures in [0, 1]", ".mul_(2 / 255).sub_(1)", ".div_(255)"),
        ("erased grey", "masked_fill_(inside, value)", "masked_fill_(inside, 0.0)"),
        ("erased one pixel more", "positions < start + length", "positions <= start + length"),
    ),
    *room(
        "keyreid/guidance/mode.py",
        f"{ALIGNED} tests/test_model_exact.py",
        (
            "guidance does not travel with its rows",
            "guidance.index_select(2, branch.order) + branch.epsilon",
            "guidance + branch.epsilon",
        ),
        ("guidance, not its logarithm", "+ branch.epsilon).log())", "+ branch.epsilon))"),
        (
            "released guidance in [0, 1]",
            "return heatmaps * 2 - 1",
            "return heatmaps",
            "tests/test_model_machinery.py -k prepare",
        ),
        (
            "sides are never swapped",
            "swaps_sides: bool = True",
            "swaps_sides: bool = False",
            READERS + " -k 'guidance_is or visib'",
        ),
        (
            "what is seen is never used",
            "uses_visibility: bool = True",
            "uses_visibility: bool = False",
            f"{RECIPE} -k 'minimised or plan_did'",
        ),
    ),
    *room(
        "keyreid/backbones/backbone.py",
        ALIGNED,
        ("no camera factor", "tokens + self.camera_factor * table", "tokens + table", f"{RECIPE} -k network"),
        (
            "unknown cameras are the first",
            "torch.where(cameras < 0, len(self.camera), cameras)",
            "cameras.clamp(min=0)",
        ),
    ),
    # -------------------------------------------------------------------------------------------------- plan, readers
    *room(
        "keyreid/shards/sampling.py",
        PLAN,
        ("each epoch the same", "counter=[0, 0, block, epoch]", "counter=[0, 0, block, 0]"),
        ("the seed ignored", "key=[seed, stream]", "key=[0, stream]"),
        ("an identity twice in a step", "swap = wish[row] & (free | (mine == yours))", "swap = wish[row]"),
        ("the same tracklet K times", "+ self._turns(number) % rows.count", "+ 0 * self._turns(number) % rows.count"),
    ),
    *room(
        "keyreid/shards/plan.py",
        PLAN,
        ("always a chunk's first frame", "(random.random(low.shape) * (high - low))", "(0 * random.random(low.shape))"),
        (
            "ranks take every R-th clip",
            "yield self._clips(*divmod(number, length), rank * share, (rank + 1) * share)",
            "yield self.step(*divmod(number, length))[rank::world_size]",
        ),
        (
            "flips where there should be none",
            "random.random(shape) < augment.flip_probability",
            "random.random(shape) > augment.flip_probability",
        ),
        (
            "erases where it should not",
            "random.random(shape) < augment.erase_probability",
            "random.random(shape) > augment.erase_probability",
        ),
        ("every frame is erased", "-1) * wanted[..., None]", "-1)"),
        ("crops to one side", "-augment.pad_pixels, augment.pad_pixels + 1", "0, augment.pad_pixels + 1"),
        ("aspect upside down", "np.sqrt(area * aspect)", "np.sqrt(area / aspect)"),
        ("evaluation leaves out a tracklet's end", "-(-total // frames)", "max(1, total // frames)"),
        ("padding is not blank", "(np.arange(frames) >= real) & mode.blanks_repeats", "np.zeros(frames, bool)"),
        ("a rank's changes of frames are its own", "block * self.batch_size + column)", "block + column - low)", LANES),
        ("groups change alike", "block * self.batch_size + column)", "block * self.batch_size)", LANES),
        ("a rank plans the whole batch", "low, high = first // self._unit * self._unit,", "low, high = 0,", LANES),
    ),
    *room(
        "keyreid/shards/lanes.py",
        LANES,
        ("lanes are those of the first epoch", "LANES, epoch, 0)", "LANES, 0, 0)"),
        ("lanes shuffle alike", "LANES, 0, 1 + number)", "LANES, 0, 1)"),
        ("two lanes of the same identities", "dealt[number :: self._lanes]", "dealt[number // 2 * 2 :: self._lanes]"),
        ("lanes of any weight", "order[np.argsort(self._rank[order], kind=", "order[np.argsort(0 * self._rank, kind="),
        ("neighbours in size never meet", "random.permuted(blocks.reshape(-1, 2 * self._lanes), axis=1)", "blocks"),
        ("a light lane repeats its steps", "epoch + turn * _AGAIN", "epoch"),
        ("light lanes may be the longest", "if start > self.steps_per_epoch:", "if False:"),
        ("the heaviest lane is an average one", "[:, :2].ravel()", "[:, self._lanes :][:, :2].ravel()"),
        (
            "windows of shards of one size",
            "random_numbers(self._seed, WINDOWS, epoch, number).permutation(parts[0])",
            "parts[0]",
            WINDOWS,
        ),
        ("windows begin too early", "start += windows[-1].sampler.steps_per_epoch", "start += 1", WINDOWS),
    ),
    *room(
        "keyreid/shards/windows.py",
        WINDOWS,
        ("identities in two shards pass", "if spilling := int((first != last).sum()):", "if spilling := 0:"),
        ("a window of too few identities passes", "if few < self._wide:", "if False:"),
        ("all shards are one window", "return max(1, shards // self.shards)", "return 1"),
        ("no room for a window's last step", "windows * (self._wide - 1)", "0"),
        (
            "windows of half the size",
            "data.window / self.identities.mean()",
            "data.window / 2 / self.identities.mean()",
        ),
    ),
    *room(
        "keyreid/shards/set_index.py",
        "tests/test_set_index.py",
        ("a file of other shards is taken", "_about(made_of).items() <= about.items()", "True"),
        ("an index that is not the card's", "if what := stranger(index, sha256(path), shard):", "if False:", VERIFY),
        ("a key twice", "if len(same := np.flatnonzero(", "if 0 * len(same := np.flatnonzero("),
        ("keys found by their beginning", "np.where(self.keys(row) == np.array(keys, np.str_), row, -1)", "row"),
        ("members begin where the last tracklet's do", "np.cumsum(steps) - steps", "np.cumsum(steps)"),
        (
            "the columns' hash is not compared",
            '["sha256"] == columns.content_sha256(folder / FILE)',
            '["sha256"] != ""',
        ),
    ),
    *room(
        "keyreid/config.py",
        LANES,
        ("lanes that do not divide P", "if self.data.identities % self.data.lanes:", "if False:"),
    ),
    *room(
        "keyreid/shards/shard_set.py",
        f"{PLAN} -k splits_by_number",
        (
            "those held out are trained on",
            "away[self.index.person[chosen]] == held_out",
            "away[self.index.person[chosen]] >= held_out",
            f"{PLAN} -k holdout",
        ),
        (
            "those held out are planned",
            "np.where(self._held_out(counts, self.holdout if holdout is None else holdout), 0, counts)",
            "counts",
            f"{PLAN} -k holdout",
        ),
        (
            "bytes are not checked",
            "if short or zlib.crc32(pieces[-1]) != checksum:",
            "if short:",
            f"{READERS} -k damaged",
        ),
        (
            "a split's people are everybody",
            "chosen = people[self.index.person[positions]]",
            "chosen = people[self.index.person[positions]] | True",
            f"{PLAN} -k splits_by_number",
        ),
    ),
    *room(
        "keyreid/shards/storage.py",
        f"{OPEN_FILES} -k nobody",
        ("files stay open", "functools.lru_cache(OPEN_FILES)", "functools.lru_cache(None)"),
    ),
    *room(
        "keyreid/shards/cache.py",
        f"{REMOTE} -k 'bound or ahead or cache'",
        ("what is on its way takes no room", "used = coming + sum(", "used = sum("),
        ("what is wanted makes room for more", "(ahead and spared)", "False"),
        ("what is let go stays", "os.utime(self._path(number), (0, 0))", "pass"),
    ),
    *room(
        "keyreid/shards/remote.py",
        RANGES,
        ("ranges are not checked", "elif right is None or right(content):", "elif True:"),
        (
            "kept ranges are not checked",
            "content is not None and (right is None or right(content))",
            "content is not None",
        ),
        ("a shard's end joins the next one's start", "joined[-1][0][0] != number or ", ""),
        (
            "each rank checks the set",
            'return card if stamp["state"] == _state(folder, card) else None',
            "return None",
            f"{REMOTE} -k later",
        ),
        ("whole shards for ever", 'if "ranges" not in stamp:', "stamp['ranges'] = False\n        if False:"),
    ),
    *room(
        "keyreid/shards/transfer.py",
        f"{REMOTE} {RANGES} -k 'trickles or refuses or for_ever or card'",
        ("no deadline", "if time.monotonic() > self.end:", "if False:"),
        ("what is refused is asked for again", "_FINAL_STATUS = (401, 403, 410)", "_FINAL_STATUS = ()"),
        ("whole files for ranges", "response.status == 200", "False"),
        ("any bytes are a shard", "sha256(partial) == digest", "True"),
    ),
    *room(
        "keyreid/shards/batch.py",
        f"{RECIPE} -k 'minimised or plan_did'",
        ("erased flags zeroed", "(self.erase[..., 2] > 0)", "(self.erase[..., 2] < 0)"),
    ),
    *room(
        "keyreid/shards/fetch.py",
        READERS,
        (
            "visibility not swapped on a flip",
            "visible = np.where(flip[..., None], visible[:, :, self.swap], visible)",
            "pass",
            f"{READERS} -k visibility_changes",
        ),
        (
            "guidance not swapped on a flip",
            "grid = np.where(flip[..., None, None, None], grid[:, :, self.swap], grid)",
            "pass",
            f"{READERS} -k guidance_is",
        ),
        ("padding has guidance", "grid[blank] = 0", "pass", f"{READERS} -k evaluation_streams"),
        ("padding counts as seen", "visible = visible & ~blank[..., None]", "pass", f"{READERS} -k evaluation_streams"),
        ("heatmaps up to 255", "one = 1.0 if self.from_keypoints else 255.0", "one = 1.0", f"{READERS} -k guidance_is"),
        (
            "keypoints not scaled to the clip",
            "stacked = scale_keypoints(stacked, sizes[:, 0], sizes[:, 1], self.width, self.height)",
            "pass",
            f"{READERS} -k published_gaussian",
        ),
    ),
    *room(
        "keyreid/shards/pooling.py",
        f"{READERS} -k guidance_is",
        ("heatmaps not mirrored", "across = np.where(flip[:, None, None, None], across[..., ::-1], across)", "pass"),
        ("guidance under the erased rectangle", "np.maximum(whole - erased, 0)", "np.maximum(whole, 0)"),
    ),
    *room(
        "keyreid/shards/plain.py",
        f"{READERS} -k 'both_readers or readers_agree'",
        ("flip without keypoints: the picture stays", "picture = picture[:, ::-1]", "pass"),
        ("crop the other way", "max(-top, 0) : height - max(top, 0)", "max(top, 0) : height - max(-top, 0)"),
        ("nearest pixel", "Image.Resampling.BICUBIC", "Image.Resampling.NEAREST"),
    ),
    *room(
        "keyreid/shards/dali.py",
        f"{READERS} -k both_readers",
        ("DALI: crop not mirrored with the flip", "crop[:, 1] *= 1 - 2 * flip", "pass"),
        ("DALI: no flip", "fn.flip(pictures, horizontal=flip)", "fn.flip(pictures, horizontal=0)"),
    ),
    # ------------------------------------------------------------------------------------------------ pose, packing
    *room(
        "keyreid/pose/heatmaps.py",
        "tests/test_heatmaps.py",
        ("unsure joints are drawn", "MIN_CONFIDENCE = 0.1", "MIN_CONFIDENCE = 0.0"),
        ("wider gaussians", "((2 * radius + 1) / 4)", "((2 * radius + 1) / 3)"),
        ("joints add up", "np.maximum(window, gaussian, out=window)", "np.add(window, gaussian, out=window)"),
        ("joints outside are drawn at the border", "& (y < height)", ""),
    ),
    *room(
        "keyreid/pose/parts.py",
        "tests/test_heatmaps.py",
        ("left and right legs swapped", '"left_leg": (13, 15)', '"left_leg": (14, 16)'),
        ("a flip swaps nothing", '{"left": "right", "right": "left"}', "{}"),
    ),
    *room(
        "keyreid/shards/writer.py",
        "tests/test_shards_format.py tests/test_shards_pack.py",
        (
            "settings not in the fingerprint",
            '"shard": name, **settings.described()',
            '"shard": name',
            "tests/test_shards_pack.py -k other_data_or_settings",
        ),
        (
            "keypoints not in the fingerprint",
            "digest.update(keypoints.tobytes())",
            "pass",
            "tests/test_shards_pack.py -k other_data_or_settings",
        ),
        (
            "a shard's hash is not compared",
            'return not every_byte or sha256(tar) == header["sha256"]',
            "return True",
            "tests/test_shards_pack.py -k whole_shards",
        ),
        (
            "visibility bits reversed",
            "visible << np.arange(settings.parts)",
            "visible << np.arange(settings.parts)[::-1]",
            f"{READERS} -k visibility_changes",
        ),
    ),
    *room(
        "keyreid/shards/layout.py",
        APPEND,
        ("tracklets in another order", "return list(tracklets)", "return list(tracklets)[::-1]", FORMAT),
        ("an identity is cut", "full and (tracklet.split not in _TOGETHER or", "full and (True or"),
        ("splits share shards", "full = not same or (", "full = ("),
        ("changed tracklets are appended to", "packed.tracklets[position].facts != index_facts(tracklet)", "False"),
        ("other settings are appended", "if card[name] != value:", "if False:"),
        ("names change their numbers", "if known.get(name, number) != number:", "if False:"),
    ),
    *room(
        "keyreid/shards/pack.py",
        "tests/test_shards_pack.py",
        ("appending takes the card away", "if todo and not layout.before:", "if todo:", APPEND),
        ("notes of other layouts count", 'if said["layout"] == layout.digest:', "if True:", APPEND),
        (
            "every share packs all",
            "range(share[0], len(layout.shards), share[1])",
            "range(len(layout.shards))",
            "tests/test_shards_pack.py -k card_appears",
        ),
    ),
    *room(
        "keyreid/shards/verify.py",
        "tests/test_shards_verify.py",
        ("members' checksums not compared", "if zlib.crc32(content) != index.crc[row]:", "if False:"),
        ("a share checks all", 'own = card["shards"][share[0] :: share[1]]', 'own = card["shards"]', APPEND),
        ("padding not looked at", 'if file.read(padding).strip(b"\\0"):', "if file.read(padding) and False:"),
    ),
    # ----------------------------------------------------------------------------------------------------- evaluation
    *room(
        "keyreid/evaluation/protocols.py",
        PROTOCOLS,
        (
            "the same camera matches",
            "matches = self._gallery.cameras[self.own(row)] != self._query.cameras[row]",
            "matches = np.ones(len(self.own(row)), bool)",
        ),
        ("junk is ranked", "if self._rules.junk_left_out and junk.any() else None", "if False else None"),
        ("official keeps junk", "queries_in_gallery=True, junk_left_out=True,", "queries_in_gallery=True,"),
        ("official's AP is rectangular", "junk_left_out=True, trapezoid=True", "junk_left_out=True"),
        ("precision one rank later", "precision = nth / rank", "precision = nth / (rank + 1)"),
        ("trapezoids start at 0", "np.maximum(rank - 1, 1), 1.0)", "np.maximum(rank - 1, 1), 0.0)"),
        ("INP of the first match", "len(rank) / rank[-1], rank[0]", "len(rank) / rank[0], rank[0]"),
        ("CMC over all queries", "/ len(first)", "/ len(self.first_match)"),
        ("CMC without its rank", 'np.arange(1, ranks + 1), side="right")', 'np.arange(1, ranks + 1), side="left")'),
        (
            "AP over all entries of the identity",
            "np.cumsum(precision)[-1] / len(rank)",
            "np.cumsum(precision)[-1] / len(matches)",
        ),
        ("same-camera entries hold places", "position[order] + 1 - np.cumsum(~matches)", "position[order] + 1"),
        (
            "released reads the right cameras",
            "side.cameras[tracklet]",
            "side.cameras",
        ),
        ("ties by chance", '(np.searchsorted(ordered, values, side="right") - position > 1).any()', "False"),
        (
            "distractors are junk",
            "(self._gallery.identities == DISTRACTOR_IDENTITY)",
            "(self._gallery.identities == JUNK_IDENTITY)",
        ),
        ("queries of one camera are valid", "> same_end - same", "> 0"),
    ),
    *room(
        "keyreid/evaluation/counting.py",
        COUNTING,
        ("ties stand behind", "np.count_nonzero(row[:at] <= value)", "np.count_nonzero(row[:at] < value)"),
        ("sorted ties in any order", "keys |= index", "pass"),
        ("each rank its own counts", "            ranks.added(before)\n", ""),
        (
            "lists of a rank alone",
            "for hits in ranks.from_all(list(own)) for hit in hits",
            "for hit in own",
            f"{COUNTING} -k bits",
        ),
        ("NaN is judged", "if broken.any():", "if False:"),
    ),
    *room(
        "keyreid/evaluation/ranking.py",
        "tests/test_evaluation_run.py",
        (
            "inclusive without its queries",
            "entries = joined(query, gallery) if with_them else gallery",
            "entries = gallery",
            "tests/test_evaluation_run.py -k scores_are",
        ),
        (
            "never re-ranked",
            "if evaluation.rerank:",
            "if False:",
            "tests/test_evaluation_run.py -k reranking",
        ),
    ),
    *room(
        "keyreid/embedding/distance.py",
        DISTANCE,
        ("squared distances", "clamp_(min=0).sqrt_()", "clamp_(min=0)"),
        ("cosine of vectors as they are", "functional.normalize(vectors, dim=1)", "vectors"),
        (
            "visible: all parts count",
            "left.weights[:, part, None] * right.weights[None, :, part]",
            "torch.ones_like(left.weights[:, part, None] * right.weights[None, :, part])",
        ),
        ("the own group is found", "keys.masked_fill_(own.to(block.device), _NO_ENTRY)", "pass"),
    ),
    *room(
        "keyreid/embedding/reranking.py",
        f"{DISTANCE} -k rerank",
        ("no local query expansion", "if self._k2 > 1:", "if False:"),
        ("lambda for 1 - lambda", "result *= 1 - self._weight", "result *= self._weight"),
        ("neighbours need not be mutual", "return forward * forward.T", "return forward"),
        ("overlap of a half", "3 * overlap.data > 2 *", "2 * overlap.data > 1 *"),
        ("Jaccard without its union", "1 - total / (2 - total)", "1 - total"),
        ("no bound", "if count > MOST:", "if False:", f"{COUNTING} -k bound"),
    ),
    *room(
        "keyreid/retrieval/index.py",
        "tests/test_retrieval_growth.py",
        (
            "new days built anew",
            "        if not held:\n            cls.build",
            "        if True:\n            cls.build",
        ),
        (
            "rows taken for the folder's",
            "self._row = None if held == sorted(held) else",
            "self._row = None if True else",
        ),
        ("a card vouches for an index cut off", 'side="right"))]', 'side="right")) + 9]'),
    ),
    *room(
        "keyreid/embedding/features.py",
        FEATURES,
        ("sum of the clips", "= total / counts[tracklet]", "= total"),
        ("training goes on in evaluation mode", "model.train(was_training)", "pass"),
        ("strange cameras taken for known", "batch.cameras if cameras_known else", "batch.cameras if True else"),
        ("batches not counted from a rank's first", "range(starts[of[0]] // size", "range(0 * starts[of[0]]"),
    ),
    *room(
        "keyreid/retrieval/search.py",
        "tests/test_embed_search.py -k exact_search",
        ("a tracklet finds itself", 'if row >= 0 and by_row[row]["key"] != query["key"]', "if row >= 0"),
        ("the own camera is searched", "if settings.other_cameras else (None, None)", "if False else (None, None)"),
    ),
    # ---------------------------------------------------------------------------------------- checkpoints and weights
    *room(
        "keyreid/checkpoints/folder.py",
        CHECKPOINTS,
        (
            "the best is the worst",
            "score > self.best_score",
            "score < self.best_score",
            "tests/test_checkpoint_kills.py",
        ),
        (
            "best never moved",
            '(("latest", state.step), ("best", state.best_step))',
            '(("latest", state.step),)',
            "tests/test_checkpoint_kills.py",
        ),
        ("latest never moved", 'replace_text(final.with_name("latest"), final.name)', "pass"),
        (
            "only the first rank's files are named",
            "for written in of_ranks for name",
            "for written in of_ranks[:1] for name",
            PARTS_WRITTEN,
        ),
        (
            "the others do not hear of a failure",
            "of_ranks = ranks.from_all(found)",
            "of_ranks = [found]",
            PARTS_WRITTEN,
        ),
        ("the best is pruned", "kept.add(root / folder_name(best_step))", "pass"),
        ("those kept for ever are pruned", "if state.keep:", "if False:"),
        ("one fewer is kept", "set(folders[-keep:])", "set(folders[1 - keep :])"),
    ),
    *room(
        "keyreid/checkpoints/manifest.py",
        CHECKPOINTS,
        ("hashes not compared", "elif (size, sha256(path)) not in either:", "elif False:"),
        ("every rank reads every file", "return int(number[1]) % ranks", "return 0", f"{PARTS} -k wrote"),
    ),
    *room(
        "keyreid/checkpoints/saved.py",
        f"{PARTS} -k 'wrote or travels or forged'",
        ("all travels", "p.reader != rank and p.part.meets(wanted[name])", "True"),
        ("parts may be missing", "if sum(len(piece.part) for piece in pieces) !=", "if False and"),
        ("forged parts are taken", "if not (part.is_sound and isinstance(dtype, torch.dtype))", "if False"),
    ),
    *room(
        "keyreid/checkpoints/run_folder.py",
        "tests/test_altered_checkpoints.py -k evaluate",
        ("weights are not verified", "if faults := verify(file.parent):", "if faults := []:"),
        (
            "raw weights before averaged ones",
            "((EMA, True), (WEIGHTS, False))",
            "((WEIGHTS, False), (EMA, True))",
            "tests/test_model_trained.py -k best_and_averaged",
        ),
        (
            "newest for best",
            '(named(root, "best") if best else None)',
            "None",
            "tests/test_model_trained.py -k best_and_averaged",
        ),
    ),
    *room(
        "keyreid/checkpoints/weights_file.py",
        "tests/test_model_trained.py",
        ("a file's own hash is not compared", "_unsigned_sha256(path, str(written)) != written", "False"),
    ),
    *room(
        "keyreid/checkpoints/start.py",
        "tests/test_model_weights.py",
        ("classifiers are always kept", "(not keep_classifiers or theirs != ours)", "theirs != ours"),
        ("new cameras are zero", "table.mean(0, keepdim=True)", "0 * table.mean(0, keepdim=True)"),
    ),
    # ---------------------------------------------------------------------------------- datasets, tracking, searches
    *room(
        "keyreid/datasets/mars.py",
        "tests/test_datasets_mars.py",
        ("rows begin one later", "names[start - 1 : end]", "names[start:end]"),
        ("queries counted from 0", "test_rows, queries - 1)", "test_rows, queries)"),
        ("junk is gallery", '"junk" if identity == JUNK_IDENTITY else', '"junk" if False else'),
    ),
    *room(
        "keyreid/datasets/two_cameras.py",
        "tests/test_datasets_two_cameras.py",
        (
            "the first half trains",
            "np.sort(order[half:]).tolist()), tuple(np.sort(order[:half]).tolist())",
            "np.sort(order[:half]).tolist()), tuple(np.sort(order[half:]).tolist())",
        ),
    ),
    *room(
        "keyreid/tracking/__init__.py",
        "tests/test_tracking.py",
        ("a resumed run repeats its numbers", "if step > last.get(key, -1)", "if True"),
        ("failures end as finished", '"FINISHED" if kind is None else "FAILED"', '"FINISHED"'),
    ),
    *room(
        "keyreid/tracking/sender.py",
        "tests/test_tracking.py",
        ("a restart sends all again", "replace_text(self._sent, str(after))", "pass"),
    ),
    *room(
        "keyreid/tuning/study.py",
        "tests/test_tuning_space.py",
        ("the best trial is the worst", "sign = 1 if mode ==", "sign = -1 if mode =="),
        ("unfinished trials may win", "max(whole or scored,", "max(scored,"),
    ),
    *room(
        "keyreid/tuning/algorithms.py",
        "tests/test_tuning_population.py",
        ("the population follows its worst", '1 if search.mode == "max" else -1', '-1 if search.mode == "max" else 1'),
    ),
    *room(
        "keyreid/tuning/search.py",
        "tests/test_tuning_space.py",
        (
            "trials are judged on the test set",
            "search.holdout or base.data.holdout or DEFAULT_HOLDOUT",
            "search.holdout or base.data.holdout",
        ),
    ),
]


def stale(break_: Break) -> str | None:
    """Why a break cannot be made: its text is not in the file exactly once."""
    path = REPOSITORY / break_.file
    count = path.read_text().count(break_.old) if path.is_file() else 0
    return None if count == 1 else f"{break_.name}: {break_.file} has {count} times: {break_.old}"


def failed(copy: Path, tests: str, broken: bool = True) -> str | None:
    """The first test that fails in the copy, None where all pass."""
    with tempfile.NamedTemporaryFile("r") as said:
        process = SERVER.Process(target=run_tests, args=(str(copy), shlex.split(tests), said.name, broken))
        process.start()
        process.join(SECONDS if broken else None)
        if process.exitcode is None:
            process.kill()
            print(f"{tests}: no end after {SECONDS} s", file=sys.stderr)
            return None
        printed = said.read()
    if process.exitcode == 0:
        return None
    if found := re.search(r"^(?:FAILED|ERROR) (\S+)", printed, re.MULTILINE):
        return found[1].removeprefix("tests/")
    raise SystemExit(f"pytest {tests}: status {process.exitcode}\n{printed}")


def run_tests(copy: str, arguments: list[str], output: str, forks: bool) -> None:
    """A process of its own: pytest's status is its own, what it prints goes to the file `output`."""
    import pytest

    os.chdir(copy)
    os.environ.update(PYTHONPATH=copy, OMP_NUM_THREADS="1")
    ours = {str(REPOSITORY), str(REPOSITORY / "benchmarks")}
    sys.path[:] = [copy, *(path for path in sys.path if path not in ours)]
    if forks:  # servers of processes that a test starts would import all again; few tests, so few threads to get stuck
        multiprocessing.context._concrete_contexts["forkserver"] = multiprocessing.get_context("fork")
    sys.stdout.flush()
    for stream in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_APPEND), stream)
    sys.exit(pytest.main(["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", *arguments]))


def main() -> None:
    """Break, test and restore, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="breaks whose name or file this pattern matches (* and ?)")
    parser.add_argument("--list", action="store_true", help="name them and do nothing")
    options = parser.parse_args()
    chosen = [b for b in BREAKS if any(fnmatch.fnmatch(word, options.only) for word in (b.name, b.file))]
    if options.list:
        print("\n".join(f"{each.file}: {each.name}" for each in chosen))
        return
    if faults := [why for each in BREAKS if (why := stale(each))]:
        raise SystemExit("stale:\n" + "\n".join(faults))
    missed = 0
    os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
    SERVER.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(REPOSITORY, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
        files = sorted({word for each in chosen for word in shlex.split(each.tests) if word.endswith(".py")})
        if unbroken := failed(copy, shlex.join(files), broken=False):
            raise SystemExit(f"{unbroken} fails without any break")
        print("| break | file | noticed by |\n|---|---|---|")
        for each in chosen:
            path = copy / each.file
            text = path.read_text()
            path.write_text(text.replace(each.old, each.new))
            by = failed(copy, each.tests)
            path.write_text(text)
            missed += by is None
            print(f"| {each.name} | {each.file} | {f'`{by}`' if by else 'NOT NOTICED'} |", flush=True)
    print(f"\n{len(chosen) - missed} of {len(chosen)} noticed")
    sys.exit(missed > 0)


if __name__ == "__main__":
    main()
