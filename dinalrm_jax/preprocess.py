"""Turns a preference dataset into records to train on.

    python -m dinalrm_jax.preprocess --dataset hpdv3 --source DIR --output DIR --base-model ID

Images go to resolution buckets and through the VAE, once each (--dataset dinalrm holds latents
already); prompts through the text encoders, once each. What cannot be used is skipped and counted by
reason; docs/data.md lists them. The work can be killed at any moment: the same command goes on with
it, and the output appears whole or not at all. On several hosts (--distributed) each process takes its
share; all of them see one file system.
"""

from dinalrm_jax.cli.command import answer_help, run_command
from dinalrm_jax.cli.options import PreprocessOptions

answer_help(__name__, __doc__, PreprocessOptions)  # before the imports that take a second

import signal

from dinalrm_jax.data.preparation import report
from dinalrm_jax.data.records import RecordsError
from dinalrm_jax.data.sources.datasets import preprocess
from dinalrm_jax.devices import processes
from dinalrm_jax.devices.compilation import enable_compilation_cache
from dinalrm_jax.disk import Locked
from dinalrm_jax.mapping import ConfigError
from dinalrm_jax.model.tables import WeightsError


def main(options: PreprocessOptions) -> None:
    """Prepares what the options name, or goes on with it."""
    processes.initialize(options.distributed)
    enable_compilation_cache()
    if options.distributed:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the preemption service's: nothing is lost by a kill
    try:
        manifest = preprocess(options.source, options.output, options.preparation, options.base_model)
    except (FileExistsError, Locked):
        raise
    except OSError as error:
        raise OSError(f"{error}; what is finished is kept, and the same command goes on from there") from error
    if processes.is_first():
        print(f"wrote {options.output}:\n{report(manifest)}")


if __name__ == "__main__":
    run_command(
        main,
        PreprocessOptions,
        errors=(RecordsError, ConfigError, WeightsError, OSError),
        interrupted="what is finished is kept, and the same command goes on from there",
        leave=processes.leave,
    )
