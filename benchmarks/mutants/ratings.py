"""Mutants of what stands beside a headline: controls, comparisons, calibration, views."""

from benchmarks.mutants import Mutant

CONTROLS, ACCURACY = "dinalrm_jax/evaluation/controls.py", "dinalrm_jax/evaluation/accuracy.py"
COMPARISON, CALIBRATION = "dinalrm_jax/evaluation/comparison.py", "dinalrm_jax/evaluation/calibration.py"
VIEWS, BENCHMARK = "dinalrm_jax/data/views.py", "dinalrm_jax/evaluation/benchmark.py"
OF_CONTROLS, OF_CALIBRATION = "tests/evaluation/test_controls.py", "tests/evaluation/test_calibration.py"
OF_VIEWS, OF_BENCHMARK = "tests/data/test_views.py", "tests/evaluation/test_benchmark.py"

MUTANTS = [
    Mutant("a probe is fitted the wrong way", CONTROLS, "difference = (chosen - rejected) / scale", "difference = (rejected - chosen) / scale", OF_CONTROLS),
    Mutant("a probe forgets its scale", CONTROLS, 'method="L-BFGS-B").x / scale', 'method="L-BFGS-B").x', OF_CONTROLS),
    Mutant("ties teach controls", CONTROLS, " if row.label != 0.5]", "]", OF_CONTROLS),
    Mutant("a ranking is judged by its own prompt", CONTROLS, "if fold_of[ranking.prompt] != fold", "if fold_of[ranking.prompt] == fold", OF_CONTROLS),
    Mutant("generators that lose are strong", CONTROLS, "(won[image.maker] + 1)", "(lost[image.maker] + 1)", OF_CONTROLS),
    Mutant("a model is ahead the wrong way", CONTROLS, "float(share), 4) for share in (theirs, ours - theirs,", "float(share), 4) for share in (theirs, theirs - ours,", OF_CONTROLS),
    Mutant("a control is resampled by itself", CONTROLS, 'resampled([control], prompts)["strict"]', 'resampled([control], prompts, 1)["strict"]', OF_CONTROLS),
    Mutant("prompts are blank only in name", BENCHMARK, '["" for _ in prompts]', "prompts", OF_BENCHMARK),
    Mutant("images of weak generators stay", BENCHMARK, "maker(image) not in benchmark.weak", "maker(image) in benchmark.weak", OF_BENCHMARK),
    Mutant("a group counts all pairs", BENCHMARK, "scores = [np.where(mask, row, np.nan) for", "scores = [row for", OF_BENCHMARK),
    Mutant("standard deviations are variances", "dinalrm_jax/evaluation/scoring.py", "latents.std(axis=(-3, -2))", "latents.var(axis=(-3, -2))", OF_CONTROLS),
    Mutant("seeds do not spread", COMPARISON, "of_seeds = by_seed.var(ddof=1) / seeds", "of_seeds = 0.0", OF_CONTROLS),
    Mutant("few seeds spread too little", COMPARISON, "stats.t.ppf(0.975, freedom)", "1.96", OF_CONTROLS),
    Mutant("what is left counts twice", COMPARISON, "max(of_seeds - left, 0.0)", "of_seeds", OF_CONTROLS),
    Mutant("prompts do not spread", COMPARISON, "of_prompts = parts.mean(axis=0).var(ddof=1) / count if", "of_prompts = 0.0 if", OF_CONTROLS),
    Mutant("worse is better", COMPARISON, '"better" if low > 0 else "worse"', '"worse" if low > 0 else "better"', OF_CONTROLS),
    Mutant("more seeds make good for prompts", COMPARISON, "- max(of_prompts - left, 0.0)", "", OF_CONTROLS),
    Mutant("the worst opinion ranks first", "dinalrm_jax/data/sources/agiqa3k.py", "tuple(-mean for mean, _ in found)", "tuple(mean for mean, _ in found)", "tests/data/sources/test_agiqa3k.py"),
    Mutant("the largest file outvotes the others", CONTROLS, "np.sign(chosen.file_bytes - rejected.file_bytes)", "(chosen.file_bytes - rejected.file_bytes)", OF_CONTROLS),
    Mutant("prompts change places with the next", CONTROLS, "len(distinct) // 2", "1", OF_CONTROLS),
    Mutant("every prompt counts alike", COMPARISON, "parts / pairs.mean()", "parts / pairs", OF_CONTROLS),
    Mutant("what no seed explains is forgotten", COMPARISON, "(of_seeds + left) / allowed", "of_seeds / allowed", OF_CONTROLS),
    Mutant("errors are those of the fitted pairs", CALIBRATION, "(_error(one, before), _error(one, after)) for one in judged", "(_error(one, before), _error(one, after)) for one in fitted", OF_CALIBRATION),
    Mutant("controls see the judged prompts", CONTROLS, "if row.prompt not in judged]", "if True]", OF_CONTROLS),
    Mutant("a prompt that is given is not read", "dinalrm_jax/evaluation/pairs.py", "[self._prompt or self._records", "[self._records", "tests/evaluation/test_pairs.py -k under_one"),
    Mutant("a view has a bucket of its own", "dinalrm_jax/data/latents.py", "original(name)", "name", OF_VIEWS),
    Mutant("shares are not read when fitting", CALIBRATION, "-(pairs.share * special", "-(1.0 * special", OF_CALIBRATION),
    Mutant("the fit forgets the 2 of two scores", CALIBRATION, "np.sqrt(2 * np.asarray(variance))", "np.sqrt(np.asarray(variance))", OF_CALIBRATION),
    Mutant("sigma_0 is its square", CALIBRATION, "sigma_0=float(np.sqrt(variance_0))", "sigma_0=float(variance_0)", OF_CALIBRATION),
    Mutant("judged by what it was fitted to", CALIBRATION, "np.flatnonzero(half_of == half)", "np.flatnonzero(half_of >= 0)", OF_CALIBRATION),
    Mutant("a fit that is no better than a coin is kept", CALIBRATION, "if gains.mean() < 2 * error:", "if False:", OF_CALIBRATION),
    Mutant("the larger file always wins", CONTROLS, "if larger >= 0 else", "if True else", OF_CONTROLS),
    Mutant("reliability forgets shares", ACCURACY, "np.where(probability > 0.5, share, 1 - np.asarray(share))", "np.where(probability > 0.5, 1.0, 0.0)", OF_CALIBRATION),
    Mutant("a fitted likelihood is not read", "dinalrm_jax/weights/pretrained.py", "if (directory / CALIBRATION).is_file():", "if False:", OF_BENCHMARK),
    Mutant("views of what is held out", VIEWS, '"train": [*pairs, *views]', '"eval": [*pairs, *views]', OF_VIEWS),
    Mutant("everything is mirrored", VIEWS, "not SIDED.search(pair.prompt) and ", "", OF_VIEWS),
    Mutant("one image of a pair is mirrored", VIEWS, "rejected=prefix + pair.rejected", 'rejected=prefix.replace("m", "") + pair.rejected', OF_VIEWS),
    Mutant("all views are one", VIEWS, "stable_hash(name)[:8]", "stable_hash(whole)[:8]", OF_VIEWS),
    Mutant("annotators' ranks are read the other way", "dinalrm_jax/data/sources/json_rows.py", "np.sign(ranks[:, None, :] - ranks[:, :, None])", "np.sign(ranks[:, :, None] - ranks[:, None, :])", "tests/data/sources/test_sources.py -k hpdv2"),
]  # fmt: skip
