"""Sequential rectified flow from the command line; README.md lists the jobs."""

import os
import re
import sys

from absl import app, flags
from ml_collections import config_flags

import runtime

FLAGS = flags.FLAGS

config_flags.DEFINE_config_file("config", None, "The configuration file, e.g. configs/rf/digits_rf_continuous.py.")
flags.DEFINE_string("workdir", None, "The folder of this run: checkpoints, pairs, figures and metrics.")
flags.DEFINE_enum("mode", None, ["train", "eval", "sample"], "train makes pairs too: --config.training.reflow_mode.")
flags.DEFINE_string("eval_folder", "eval", "The folder inside workdir for the results of eval and sample.")
flags.DEFINE_string("log_name", "seqrf", "The name of the run in Weights & Biases.")
flags.DEFINE_string("coordinator_address", None, "HOST:PORT of the first of several hosts.")
flags.DEFINE_integer("num_processes", None, "The number of processes; 1: alone, whatever a cluster says.")
flags.DEFINE_integer("process_id", None, "The number of this process, from 0.")
flags.DEFINE_bool("deterministic", False, "On a GPU: the same bits in every run, at some cost in speed.")
flags.DEFINE_bool("dry_run", False, "Print what would be done, from what into what, on which devices, and stop.")
flags.mark_flags_as_required(["workdir", "config", "mode"])


@runtime.failures_shared()
def main(argv: list[str]):
    """Dispatches to `run_lib`; imports it late, so that --help answers at once."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; flags look like --config.training.reflow_t=2")
    try:
        os.getcwd()
    except OSError:
        _end("the current folder has been removed; change to another one")
    config = _config()
    hosts = {name: FLAGS[name].value for name in runtime.HOST_SETTINGS}
    runtime.set_environment(deterministic=FLAGS.deterministic, **hosts)
    with runtime.preemption.handled():
        _run(config)


def _run(config):
    from utils import InputError, disk_error

    try:
        if any("://" in argument for argument in sys.argv):
            runtime.tensorflow_on_cpu()  # by which epath reads and writes buckets
        import run_lib

        with runtime.terminal_logging():
            named = {"log_name": FLAGS.log_name, "dry_run": FLAGS.dry_run}
            if FLAGS.mode == "train":
                run_lib.train(config, FLAGS.workdir, **named)
            elif FLAGS.mode == "eval":
                run_lib.evaluate(config, FLAGS.workdir, FLAGS.eval_folder, **named)
            else:
                run_lib.sample(config, FLAGS.workdir, FLAGS.eval_folder, dry_run=FLAGS.dry_run)
            # A signal that arrived after the last check: exit non-zero, so that a calling script stops.
            runtime.preemption.check()
    except runtime.Preempted as stop:
        print(f"{stop}; resume with the same command", file=sys.stderr, flush=True)
        runtime.leave(stop.exit_code, agreed=stop.agreed)
    except InputError as error:
        _end(str(error))
    except Exception as error:
        if (cause := disk_error(error)) is None:
            raise
        _end(f"{cause.filename or FLAGS.workdir}: {cause.strerror}; the same command resumes from what is complete")


def _end(message):
    print(f"error: {' '.join(message.split())}".replace(" ;", ";"), file=sys.stderr, flush=True)
    runtime.leave(2)


def _parsed_flags(argv):
    """absl's parser, with one line for what a wrong --config.* raises (a wrong key, type or file)."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        message, _, trace = str(error).partition("Traceback (most recent call last):")
        _end(f"{message} {trace.strip().splitlines()[-1] if trace else ''}; see --help")  # of a trace the last line
    except (AttributeError, KeyError) as error:
        # The message of ml_collections is the last part of the unknown name, in quotes, and perhaps a line of advice.
        name, meant = re.findall(r"\w+", str(error))[0], re.search(r'Did you mean "(\w+)"', str(error))
        given = next((argument for argument in argv if argument.startswith("--config.") and name in argument), name)
        _end(f"unknown setting {given}; {f'did you mean {meant[1]}? ' if meant else ''}configs/default.py lists all")


def _config():
    """The configuration. ml_collections keeps the error of a file that it cannot read until a setting is asked for."""
    try:
        FLAGS.config.seed  # noqa: B018
        return FLAGS.config
    except Exception as error:
        _end(f"cannot read --config: {error}")


if __name__ == "__main__":
    app.run(main, flags_parser=_parsed_flags)
