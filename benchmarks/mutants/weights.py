"""Mutants of reading and writing weights."""

from benchmarks.mutants import Mutant

RELEASED, PRETRAINED = "dinalrm_jax/weights/released.py", "dinalrm_jax/weights/pretrained.py"
RULES, FILES = "dinalrm_jax/model/tables.py", "dinalrm_jax/weights/files.py"
CHECKPOINT = "dinalrm_jax/training/run_weights.py"
OF_WEIGHTS, OF_RUNS = "tests/weights/test_pretrained.py", "tests/test_train.py"

MUTANTS = [
    Mutant("missing weights are not reported", RULES, "for name in shapes if name not in seen]", "for name in []]",
           f"{OF_WEIGHTS} -k wrong_names"),
    Mutant("unknown weights are left out in silence", RULES, 'problems.append(f"unknown: {name}")', "pass",
           f"{OF_WEIGHTS} -k wrong_names"),
    Mutant("misshapen weights are taken", RULES, "if array.shape != shapes[ours].shape:", "if False:",
           f"{OF_WEIGHTS} -k wrong_names"),
    Mutant("the adapter's rank is not compared", PRETRAINED, "if found != expected:\n        raise ConfigError(f\"{adapter}",
           "if False:\n        raise ConfigError(f\"{adapter}", f"{OF_WEIGHTS} -k do_not_fit"),
    Mutant("alpha is the rank", RELEASED, 'alpha=float(lora["lora_alpha"])', 'alpha=float(lora["r"])',
           "tests/test_golden.py -k level_per_row"),
    Mutant("the released variance is another", RELEASED, '"thurstone": LossConfig(sigma_0=0.05**0.5', '"thurstone": LossConfig(sigma_0=0.05',
           f"{OF_WEIGHTS} -k likelihood"),
    Mutant("the likelihood is not exported", RELEASED, '{} if trained_with is None else {"likelihood"', '{} if True else {"likelihood"',
           f"{OF_WEIGHTS} -k likelihood"),
    Mutant("a logistic model is exported without its logistic", RELEASED, "    if config.logistic:\n        raise ConfigError(\"a logistic model cannot",
           "    if False:\n        raise ConfigError(\"a logistic model cannot", f"{OF_WEIGHTS} -k not_exported"),
    Mutant("a training checkpoint gives its parameters", CHECKPOINT, 'which = "params" if saved.get("ema") is None else "ema"',
           'which = "params"', f"{OF_RUNS} -k saved_model"),
    Mutant("a training checkpoint has a random backbone", CHECKPOINT, "    if config.generator is not None:\n        return truncate",
           "    if False:\n        return truncate", f"{OF_RUNS} -k saved_model"),
    Mutant("another model may be gone on from", CHECKPOINT, "if model.config != config.model:", "if False:", f"{OF_RUNS} -k goes_on"),
    Mutant("a shared backbone of another dtype is taken", PRETRAINED,
           "elif (array.shape, array.dtype) != (shape.shape, jnp.dtype(execution.dtype)):", "elif array.shape != shape.shape:",
           "tests/test_examples.py -k do_not_fit"),
    Mutant("blocks beyond the model's are unknown weights", "dinalrm_jax/model/backbone/sd3/weights.py", '(?!(?:{kept})\\.)\\d+', '(?!(?:{kept})\\.)\\d\\d\\d',
           "tests/test_golden.py -k level_per_row"),
    Mutant("the patch's rows and columns change places", "dinalrm_jax/model/backbone/sd3/weights.py", "kernel.transpose(0, 2, 3, 1)",
           "kernel.transpose(0, 3, 2, 1)", "tests/model/backbone/test_sd3.py -k velocity"),
    Mutant("a family's name is not written", "dinalrm_jax/model/backbone/family.py",
           'return {} if self.family == DEFAULT else {"family": self.family}', "return {}",
           "tests/model/backbone/test_family.py -k told_apart"),
    Mutant("SD3's files name their family", "dinalrm_jax/model/backbone/family.py",
           'return {} if self.family == DEFAULT else {"family": self.family}', 'return {"family": self.family}',
           "tests/model/backbone/test_family.py -k told_apart"),
    Mutant("a second family of one name replaces the first", "dinalrm_jax/model/backbone/family.py",
           "if _FAMILIES.get(name, family) != family:", "if False:", "tests/model/backbone/test_family.py -k told_apart"),
    Mutant("diffusers' defaults are SD3.5-Medium's", "dinalrm_jax/model/backbone/sd3/config.py",
           '"dual_attention_layers": (),', '"dual_attention_layers": tuple(range(13)),',
           "tests/model/backbone/test_family.py -k published"),
    Mutant("SD3.5-Large has Medium's heads", "dinalrm_jax/model/backbone/sd3/config.py", "num_attention_heads=38,",
           "num_attention_heads=24,", "tests/model/backbone/test_family.py -k published"),
    Mutant("text taps of a backbone without text pass", "dinalrm_jax/model/config.py",
           "if deepest is None and self.text_taps:", "if False:", "tests/model/backbone/test_family.py -k told_apart"),
    Mutant("the head's parameters have no place", "dinalrm_jax/model/reward.py", '*under("head", (*RULES, *LRM_RULES)),', "*RULES, *LRM_RULES,",
           "tests/devices/test_sharding.py"),
]  # fmt: skip
