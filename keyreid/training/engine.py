"""The engine that trains: DeepSpeed behind the few words that training needs. Nothing else touches DeepSpeed.

DeepSpeed's own checkpoint files hold the shards of one world size and one ZeRO stage. Here the engine says which part
of each weight and optimizer state a rank holds (distributed/parts.py), so that what is saved fits any number of ranks
and any stage. Weights are put back before the engine is built, optimizer states afterwards, where they are held.
"""

import importlib.abc
import logging
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from keyreid.config import Config
from keyreid.distributed.parts import Held, Part
from keyreid.training.class_optimizer import ClassOptimizer
from keyreid.training.engine_config import deepspeed_config
from keyreid.training.schedule import OPTIMIZER_STATES, create_states

LOSS_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # DeepSpeed's dynamic scaler
T = TypeVar("T")
Read = Callable[[Mapping[str, Part]], Iterable[tuple[str, Tensor]]]  # the parts that are asked for, from a checkpoint


class Engine:
    """Runs a module and optimizes it: shards, casts and scales as the configuration says.

    Args:
        module: its `forward(stage, **inputs)` is `stage(**inputs)`; parameters in float32 on the CPU or on `device`.
        optimizer: over the module's parameters; its state is sharded by `training.zero_stage`.
        steps: optimizer steps taken before, where the states are put back afterwards.
        classes: trained in the same steps, outside of the module.

    Raises:
        ConfigError: `training` and the DeepSpeed configuration contradict each other; see also check_precision.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: Config,
        device: torch.device,
        steps: int = 0,
        classes: ClassOptimizer | None = None,
    ) -> None:
        deepspeed = import_deepspeed()
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        # On CPUs DeepSpeed would compile a shared-memory all-reduce at first use, behind a lock file that a killed
        # process leaves for ever. gloo does without it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.module, self.device, self.classes = module, device, classes
        self._optimizer, self._stage = optimizer, config.training.zero_stage
        self._deepspeed, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            config=deepspeed_config(config, device.type == "cuda"),
            dist_init_required=False,
        )
        self.about = f"DeepSpeed {deepspeed.__version__} ({type(self._deepspeed).__name__}), ZeRO {self._stage}"
        self._clipped_norm: Tensor | None = None
        if self._stage == 0:  # ZeRO clips and reports the norm itself
            self._limit = config.training.clip_gradient_norm or float("inf")
            optimizer.register_step_pre_hook(self._clip_gradients)
        self._create_optimizer_states(steps)

    def train(self, mode: bool = True) -> None:
        """Training or evaluation mode of the module."""
        self._deepspeed.train(mode)

    def run(self, stage: Callable[..., T], **inputs: object) -> T:
        """`stage(**inputs)`, a method of the module, where weights are cast and gathered."""
        return self._deepspeed(stage, **inputs)

    def begin_passes(self) -> None:
        """Before the first of several backward passes of one step.

        At ZeRO 3, DeepSpeed 0.19.8 copies a step's first gradients over those of the step before and adds the rest; a
        parameter that has none in the first pass would add to what is left from the step before.
        """
        if self._stage == 3:
            self._deepspeed.optimizer.grad_partitions_flat_buffer.zero_()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a scalar to the step's."""
        self._deepspeed.backward(loss)

    def discard(self) -> None:
        """Forget the gradients of this step's backward passes, instead of `step`."""
        optimizer = self._deepspeed.optimizer
        self._deepspeed.zero_grad()
        if self.classes is not None:
            self.classes.discard()
        if self._stage:
            optimizer.zero_grad()
            optimizer.reset_cpu_buffers()
            optimizer.averaged_gradients = {}
        if self._stage in (1, 2):
            optimizer.micro_step_id = -1
            optimizer.all_grad_tensors = {}  # what earlier passes of the step left
        if self._stage == 3:
            optimizer.grad_partitions_flat_buffer.zero_()

    def step(self) -> bool:
        """Average the gradients over the ranks, clip and apply them; False where the fp16 gradients overflowed."""
        if self.classes is not None:
            self.classes.complete()
        self._deepspeed.step()
        if self.classes is not None:
            self.classes.step()
        return self._deepspeed.was_step_applied()

    @property
    def gradient_norm(self) -> Tensor | float | None:
        """2-norm of the last step's global gradient before clipping."""
        if not self._stage:
            return self._clipped_norm
        norm = self._deepspeed.get_global_grad_norm()
        return norm if self.classes is None else (norm**2 + self.classes.squared_norm) ** 0.5

    @property
    def loss_scale(self) -> float:
        """What a loss is multiplied with before its backward pass (fp16; else 1)."""
        if self._deepspeed.torch_autocast_z0_gradscaler is not None:
            return self._deepspeed.torch_autocast_z0_gradscaler.get_scale()
        return float(getattr(self._deepspeed.optimizer, "loss_scale", 1.0))

    def _clip_gradients(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if self.classes is None:
            self._clipped_norm = torch.nn.utils.clip_grad_norm_(parameters, self._limit)
            return
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        self._clipped_norm = (norm**2 + self.classes.squared_norm) ** 0.5
        torch.nn.utils.clip_grads_with_norm_([*parameters, *self.classes.parameters], self._limit, self._clipped_norm)

    def _create_optimizer_states(self, steps: int) -> None:
        """Give the optimizer the zero states that it would make at its first step, as if `steps` had been taken.

        Needed before states can be put back, and always with several parameter groups: ZeRO 1 and 2 map states to
        parameters after the first group's first step, when the other groups have none (DeepSpeed 0.19.8).
        """
        optimizer, engine = self._optimizer, self._deepspeed.optimizer
        # ZeRO 3 hands the optimizer one flat sub-group at a time, and only while it steps.
        shards = getattr(engine, "fp32_partitioned_groups_flat", None)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        create_states(optimizer, shards or parameters, steps)
        if hasattr(engine, "_lazy_init_hp_params_optimizer_state"):
            engine._lazy_init_hp_params_optimizer_state()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Each parameter, float32 and whole; a collective for each, so all ranks must iterate to the end."""
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_get_full_fp32_param

        for name, parameter in self.module.named_parameters():
            whole = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
            if whole is None:  # no float32 state beside it: not trained, or the engine shards nothing
                with GatheredParameters([parameter]):
                    whole = parameter.detach().clone()
            yield name, whole.detach()

    def held_weights(self) -> dict[str, Held]:
        """What this rank holds of each parameter, float32 where it is trained."""
        return {name: self._held(parameter) for name, parameter in self.module.named_parameters()}

    def held_states(self) -> dict[str, Held]:
        """`NAME/STATE` and what this rank holds of it, for each trained parameter."""
        keys = OPTIMIZER_STATES[type(self._optimizer)]
        return {f"{name}/{key}": self._held(parameter, key) for name, parameter in self._trained() for key in keys}

    def restore_weights(self, read: Read) -> None:
        """Put what was `held_weights` into the float32 copies of an engine that computes in lower precision."""
        from deepspeed.utils import safe_set_local_fp32_param

        parameters = dict(self._trained())
        held = {name: self._held(parameter) for name, parameter in parameters.items()}
        for name, values in read({name: each.part for name, each in held.items()}):
            if hasattr(parameter := parameters[name], "ds_id"):
                safe_set_local_fp32_param(parameter, padded(parameter, values.to(self.device)))
            else:
                held[name].put(values)

    def restore_optimizer_states(self, read: Read) -> None:
        """Put `held_states` back."""
        from deepspeed.utils import safe_set_local_optimizer_state

        parameters, held = dict(self._trained()), self.held_states()
        if self.classes is not None:
            held |= self.classes.held_states()
        for name, values in read({name: each.part for name, each in held.items()}):
            of, _, key = name.rpartition("/")
            parameter = parameters.get(of)  # None: of sharded classes
            if hasattr(parameter, "ds_id"):
                safe_set_local_optimizer_state(parameter, padded(parameter, values.to(self.device)), key)
            else:
                held[name].put(values)

    def _held(self, parameter: nn.Parameter, key: str | None = None) -> Held:
        """Of a parameter, or of a state of it."""
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        if hasattr(parameter, "ds_id"):
            part = own_part_of(parameter)
            if key is not None:
                return Held(part, lambda: safe_get_local_optimizer_state(parameter, key)[: len(part)])
            if parameter.requires_grad:
                return Held(part, lambda: safe_get_local_fp32_param(parameter)[: len(part)])
            return Held(part, lambda: parameter.ds_tensor[: len(part)])
        if not hasattr(parameter, "_hp_mapping"):
            return Held.by_all(parameter if key is None else self._optimizer.state[parameter][key])
        if (fragment := parameter._hp_mapping) is None:  # all of it is other ranks'
            return Held(Part.whole(parameter.shape).cut(0, 0), lambda: parameter.new_empty(0))
        start, numbers = fragment.lp_fragment_address.start, fragment.lp_fragment_address.numel
        part = Part.whole(parameter.shape).cut(start, start + numbers)
        return Held(part, lambda: fragment.get_hp_fragment(key))

    def loss_scale_state(self) -> dict[str, float]:
        """State of the fp16 loss scaler, wherever DeepSpeed keeps it; empty without one."""
        if (scaler := self._grad_scaler()) is not None:
            return {key: float(value) for key, value in scaler.state_dict().items()}
        scaler = getattr(self._deepspeed.optimizer, "loss_scaler", None)
        return {key: float(getattr(scaler, key)) for key in LOSS_SCALER_FIELDS if hasattr(scaler, key)}

    def restore_loss_scale(self, values: Mapping[str, float]) -> None:
        """Put `loss_scale_state` back."""
        scaler = self._grad_scaler()
        if scaler is not None and values:
            whole = {key: int(values[key]) for key in ("growth_interval", "_growth_tracker")}
            scaler.load_state_dict({**values, **whole})
            return
        for key, value in values.items():
            setattr(self._deepspeed.optimizer.loss_scaler, key, value if key == "cur_scale" else int(value))

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, parameter) for name, parameter in self.module.named_parameters() if parameter.requires_grad]

    def _grad_scaler(self) -> torch.amp.GradScaler | None:
        """torch's scaler: under autocast the engine has one without ZeRO, and ZeRO's optimizer has one with it."""
        own = self._deepspeed.torch_autocast_z0_gradscaler
        return own or getattr(self._deepspeed.optimizer, "torch_autocast_gradscaler", None)


class WeightAverage:
    """average <- decay * average + (1 - decay) * weights, kept where the weights are: whole, or each rank its shard.

    Args:
        network: its trained parameters are averaged; built into the engine already.
        decay: per applied step.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self._parameters = dict(network.named_parameters())
        self._averages = {name: getattr(p, "ds_tensor", p).detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights of this step in."""
        current = [getattr(parameter, "ds_tensor", parameter) for parameter in self._parameters.values()]
        torch._foreach_lerp_(list(self._averages.values()), current, 1 - self.decay)

    def full(self) -> dict[str, Tensor]:
        """The whole averages by name; a collective under ZeRO 3."""
        return {name: joined(self._parameters[name], average) for name, average in self._averages.items()}

    def held(self) -> dict[str, Held]:
        """What this rank holds of each average."""
        return {name: self._held(self._parameters[name], average) for name, average in self._averages.items()}

    @staticmethod
    def _held(parameter: nn.Parameter, average: Tensor) -> Held:
        if not hasattr(parameter, "ds_tensor"):
            return Held.by_all(average)
        part = own_part_of(parameter)
        return Held(part, lambda: average[: len(part)])


def own_part_of(parameter: nn.Parameter) -> Part:
    """This rank's part of a parameter that ZeRO 3 shards."""
    size = parameter.ds_tensor.numel()
    return Part.whole(parameter.ds_shape).cut(size * dist.get_rank(), size * (dist.get_rank() + 1))


def padded(parameter: nn.Parameter, values: Tensor) -> Tensor:
    """The values of this rank's part, as long as its shard: DeepSpeed's own setter forgets the padding."""
    return torch.nn.functional.pad(values, (0, parameter.ds_tensor.numel() - len(values)))


def joined(parameter: nn.Parameter, part: Tensor) -> Tensor:
    """The whole value of which each rank holds its `part`; a collective under ZeRO 3."""
    if not hasattr(parameter, "ds_tensor"):
        return part
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part)
    return torch.cat(parts)[: parameter.ds_numel].view(parameter.ds_shape)


def count_parameters(module: nn.Module) -> int:
    """Numbers in a module's parameters, whatever this rank holds of them."""
    return sum(p.ds_numel if hasattr(p, "ds_numel") else p.numel() for p in module.parameters())


class _NoMlflow(importlib.abc.MetaPathFinder):
    """Refuses MLflow to this thread: DeepSpeed's autotuner takes it where it finds it, for 1.5 s and 100 MB a rank."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()  # the first rank's tracker may be importing it in another

    def find_spec(self, name: str, *_: object) -> None:
        """Nothing is found here; one name is not to be found anywhere."""
        if name == "mlflow" and threading.get_ident() == self._thread:
            raise ModuleNotFoundError("not needed here", name=name)


def import_deepspeed():
    """The module, imported as where MLflow is not installed; DeepSpeed is made for that."""
    finder = _NoMlflow()
    sys.meta_path.insert(0, finder)
    try:
        import deepspeed
    finally:
        sys.meta_path.remove(finder)
    return deepspeed
