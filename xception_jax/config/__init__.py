"""Configs: typed sections with checks and sources, and conversions from and to ml_collections and JSON.

A file in `configs/` starts from `default_config()` and changes what its experiment needs; `resolve` makes the typed
config of it that all other code takes.
"""

from xception_jax.config.convert import (
    FIELDS,
    default_config,
    default_values,
    flatten,
    from_json,
    load_config,
    override,
    resolve,
    resolve_model,
    to_dict,
    to_json,
    unknown_field,
)
from xception_jax.config.experiment import (
    DataConfig,
    DistributedConfig,
    ExperimentConfig,
    MeshConfig,
    WatchdogConfig,
)
from xception_jax.config.fields import duration_in_steps, is_address
from xception_jax.config.model import BatchNormConfig, InceptionV3Config, ModelConfig, XceptionConfig
from xception_jax.config.section import Section
from xception_jax.config.training import (
    AdamConfig,
    LAMBConfig,
    LionConfig,
    OptimizerConfig,
    RMSPropConfig,
    ScheduleConfig,
    SGDConfig,
    StaircaseConfig,
)

__all__ = [
    "FIELDS",
    "AdamConfig",
    "BatchNormConfig",
    "DataConfig",
    "DistributedConfig",
    "ExperimentConfig",
    "InceptionV3Config",
    "LAMBConfig",
    "LionConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RMSPropConfig",
    "SGDConfig",
    "ScheduleConfig",
    "Section",
    "StaircaseConfig",
    "WatchdogConfig",
    "XceptionConfig",
    "default_config",
    "default_values",
    "duration_in_steps",
    "flatten",
    "from_json",
    "is_address",
    "load_config",
    "override",
    "resolve",
    "resolve_model",
    "to_dict",
    "to_json",
    "unknown_field",
]
