"""Four CPU devices, so that tensor parallelism is tested everywhere."""

import jax

jax.config.update("jax_num_cpu_devices", 4)
