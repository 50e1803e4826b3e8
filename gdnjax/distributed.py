"""Several processes of one program, on JAX's own runtime: how one joins them, and what it means to lose one.

Process 0 has the engine; the others follow it (`gdnjax/serving/processes.py`). No jax before it is asked for.
"""

LOST = 3
"""Exit status of a process that has lost another."""


class ProcessLostError(RuntimeError):
    """Another process of this program is gone, or has failed: says which, where it ran, and how that was noticed.

    Nothing can be computed any more, and this process ends a few seconds later, whatever it is at.
    """


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: int = 300,
) -> int:
    """Joins the processes of a program, and returns the number of this one. To be called before anything else of jax,
    in each of them; waits for the others for `timeout` seconds.

    coordinator_address  "host:port" of process 0, the same everywhere; any port that is free there.

    What is None the launcher says: JAX knows Slurm, Open MPI, Kubernetes and Cloud TPUs, and JAX_COORDINATOR_ADDRESS
    names the address. With Slurm and Open MPI JAX gives each process one device, unless JAX_LOCAL_DEVICE_IDS names
    others. Raises ValueError that names what is missing or wrong, and RuntimeError where JAX has begun already, or the
    others do not come.
    """
    _check(coordinator_address, num_processes, process_id)
    import jax

    # What CPU devices of several processes sum with; other platforms bring their own.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It takes SIGTERM for itself, which would end nothing any more.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(coordinator_address, num_processes, process_id, initialization_timeout=timeout)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"joining the processes of this program: {error} Allowed: coordinator address, number of processes and "
            "process id, or a launcher that JAX knows (Slurm, Open MPI, Kubernetes) and that names them"
        ) from error
    return jax.process_index()


def _check(coordinator_address: str | None, num_processes: int | None, process_id: int | None) -> None:
    if coordinator_address is not None and not coordinator_address.rpartition(":")[2].isdigit():
        raise ValueError(f"the coordinator's address is {coordinator_address!r}; allowed: HOST:PORT")
    if num_processes is not None and num_processes < 1:
        raise ValueError(f"the number of processes is {num_processes}; allowed: 1 and more")
    if process_id is not None and process_id < 0:
        raise ValueError(f"the process id is {process_id}; allowed: 0 and more")
    if num_processes is not None and process_id is not None and process_id >= num_processes:
        raise ValueError(
            f"the process id is {process_id}, of {num_processes} processes; allowed: 0 to {num_processes - 1}"
        )
