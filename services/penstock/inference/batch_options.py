"""How requests of one version may wait and be put together, as its configuration says."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from penstock.inference.padding import Padding, padding_of
from penstock.oip.model_config_pb2 import ModelConfig, ModelQueuePolicy
from penstock.rpc.errors import WrongStateError


@dataclass(frozen=True)
class QueuePolicy:
    """What becomes of a request that waits. Times are microseconds, 0 is no limit."""

    max_queue_size: int
    timeout_us: int = 0
    # A request that waited too long runs after all others, rather than never.
    delays: bool = False
    allow_override: bool = True

    def timeout_of(self, asked_us: int) -> int:
        """The limit for a request that asked for one of its own: the shorter of the two, where it may ask."""
        if not (asked_us and self.allow_override):
            return self.timeout_us
        return min(asked_us, self.timeout_us) if self.timeout_us else asked_us


@dataclass(frozen=True)
class BatchOptions:
    """`max_batch_size` rows a run at most; 0: the model has no batch axis, one request a run."""

    max_batch_size: int
    default_policy: QueuePolicy
    preferred_batch_sizes: tuple[int, ...] = ()
    max_queue_delay_us: int = 0
    preserve_ordering: bool = False
    # Levels 1, the most urgent, to `priority_levels`.
    priority_levels: int = 1
    default_level: int = 1
    level_policies: Mapping[int, QueuePolicy] = field(default_factory=dict)
    padding: Padding | None = None

    def policy(self, level: int) -> QueuePolicy:
        return self.level_policies.get(level, self.default_policy)

    @classmethod
    def of(cls, config: ModelConfig, max_queue_size: int) -> "BatchOptions":
        """The options of a complete configuration. `max_queue_size` holds where that names none.

        Raises `WrongStateError` for a configuration that cannot be served.
        """
        batching = config.dynamic_batching
        preferred = tuple(sorted(batching.preferred_batch_size))
        if preferred and not 1 <= preferred[0] <= preferred[-1] <= max(1, config.max_batch_size):
            raise WrongStateError(
                f"The configuration's preferred_batch_size needs sizes from 1 to max_batch_size "
                f"{config.max_batch_size}; got {list(preferred)}."
            )
        default = (
            _policy(batching.default_queue_policy, max_queue_size)
            if batching.HasField("default_queue_policy")
            else QueuePolicy(max_queue_size)
        )
        levels = max(1, batching.priority_levels)
        return cls(
            max_batch_size=config.max_batch_size,
            default_policy=default,
            preferred_batch_sizes=preferred,
            max_queue_delay_us=batching.max_queue_delay_microseconds,
            preserve_ordering=batching.preserve_ordering,
            priority_levels=levels,
            default_level=min(batching.default_priority_level or 1, levels),
            level_policies={
                level: _policy(policy, max_queue_size) for level, policy in batching.priority_queue_policy.items()
            },
            padding=padding_of(config),
        )


def _policy(policy: ModelQueuePolicy, max_queue_size: int) -> QueuePolicy:
    return QueuePolicy(
        max_queue_size=policy.max_queue_size or max_queue_size,
        timeout_us=policy.default_timeout_microseconds,
        delays=policy.timeout_action == ModelQueuePolicy.DELAY,
        allow_override=policy.allow_timeout_override,
    )
