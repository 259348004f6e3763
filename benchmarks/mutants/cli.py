"""Mutants of the commands' flags, help and errors."""

from benchmarks.mutants import Mutant

FLAGS, OPTIONS, CONFIGS = "dinalrm_jax/cli/flags.py", "dinalrm_jax/cli/options.py", "dinalrm_jax/cli/configs.py"
COMMAND, TESTS = "dinalrm_jax/cli/command.py", "tests/cli/test_flags.py"

MUTANTS = [
    Mutant("--no-flag sets the flag", FLAGS, 'given[flag.path] = name.replace("_", "-") in (flag.name, *flag.aliases)',
           "given[flag.path] = True", f"{TESTS} -k kinds"),
    Mutant("a flag with underscores is unknown", FLAGS, '_find(name.replace("_", "-"), named)', "_find(name, named)", f"{TESTS} -k kinds"),
    Mutant("of a list given twice the last counts", FLAGS, "(*given.get(flag.path, ()), *read) if flag.is_list else read", "read",
           f"{TESTS} -k kinds"),
    Mutant("what must be given need not be", FLAGS, "if flag.default is NONE and flag.path not in given]", "if False]",
           f"{TESTS} -k usage"),
    Mutant("an argument too many is ignored", FLAGS, "    if loose:\n        raise UsageError", "    if False:\n        raise UsageError",
           f"{TESTS} -k usage"),
    Mutant("a config in the options keeps its defaults", FLAGS, "return dataclasses.replace(instance, **changes)", "return instance",
           f"{TESTS} -k kinds"),
    Mutant("the ensemble is its first level", OPTIONS, "return self.sigma if len(self.sigma) > 1 else", "return",
           f"{TESTS} -k kinds"),
    Mutant("levels beyond pure noise are taken", OPTIONS, "if not all(0 <= level <= 1 for level", "if not all(0 <= level for level",
           f"{TESTS} -k usage"),
    Mutant("a usage error ends with 1", COMMAND, "        sys.exit(2)\n\n\ndef run_command", "        sys.exit(1)\n\n\ndef run_command",
           f"{TESTS} -k list_of_commands"),
    Mutant("a section cannot be turned off", CONFIGS, "section[key] = None", "pass", f"{TESTS} -k packaged"),
    Mutant("a key below what is None is not named", CONFIGS, "{there[1] or there[2]}", "{there[1]}", f"{TESTS} -k not_there"),
    Mutant("packaged configs are not found", CONFIGS, "        path = ours\n", "", f"{TESTS} -k packaged"),
    Mutant("a known error ends with 1", COMMAND, "        leave(2)", "        leave(1)", f"{TESTS} -k ends"),
    Mutant("Ctrl-C ends with 2", COMMAND, "        leave(130)", "        leave(2)", f"{TESTS} -k ends"),
    Mutant("a bug is told as a user's mistake", COMMAND, "    except errors as error:", "    except Exception as error:", f"{TESTS} -k ends"),
]  # fmt: skip
