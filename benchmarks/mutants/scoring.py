"""Mutants of scoring and of accuracies."""

from benchmarks.mutants import Mutant

SCORING, NOISE, MODEL = "dinalrm_jax/evaluation/scoring.py", "dinalrm_jax/noise.py", "dinalrm_jax/reward_model.py"
ACCURACY, REPORT = "dinalrm_jax/evaluation/accuracy.py", "dinalrm_jax/evaluation/benchmark_report.py"
EVALUATOR, PAIRS = "dinalrm_jax/evaluation/benchmark.py", "dinalrm_jax/evaluation/pairs.py"
OF_SCORING, OF_MODEL = "tests/evaluation/test_scoring.py", "tests/test_reward_model.py"
OF_ACCURACY, OF_EVALUATION = "tests/evaluation/test_accuracy.py", "tests/evaluation/test_benchmark.py"
JUDGES = "tests/evaluation/test_judges.py"

MUTANTS = [
    Mutant("an image's noise ignores its name", NOISE, 'f"{self.seed}\\0{name}"', 'f"{self.seed}\\0"', "tests/test_noise.py"),
    Mutant("an image's noise ignores the seed", NOISE, 'f"{self.seed}\\0{name}"', 'f"\\0{name}"', "tests/test_noise.py"),
    Mutant("shared noise is each image's own", NOISE, "if self.shared:", "if False:", "tests/test_noise.py"),
    Mutant("a seed loses its higher half", NOISE, "[bits >> np.uint64(32), bits", "[bits * np.uint64(0), bits", "tests/test_noise.py"),
    Mutant("images are scored under the next one's prompt", SCORING, "embeddings([prompts[index] for index in rows])",
           "embeddings([prompts[index] for index in rows[::-1]])", f"{OF_SCORING} -k many_sizes"),
    Mutant("scores of a padded batch are shifted", SCORING, "scores[good] = scorer(latents, embeds, named)[: len(good)]", "scores[good] = scorer(latents, embeds, named)[-len(good) :]",
           f"{OF_SCORING} -k many_sizes"),
    Mutant("samples are the first one", MODEL, "found.scores[:, 0].mean(axis=1)", "found.scores[:, 0, 0]", f"{OF_SCORING} -k samples"),
    Mutant("the lowest score is first", SCORING, "np.sum(np.asarray(scores) > score)", "np.sum(np.asarray(scores) < score)",
           f"{OF_SCORING} -k ranks"),
    Mutant("normalised scores without their offset", SCORING, "else raw) + 10) / 10", "else raw) + 0) / 10", f"{OF_MODEL} -k normalize"),
    Mutant("scores that are not finite pass", SCORING, "if not np.isfinite(scores).all():", "if False:", f"{OF_SCORING} -k finite"),
    Mutant("what people tied counts (M1)", ACCURACY, '"strict": (weights @ counts.correct) / (weights @ counts.strict)',
           '"strict": (weights @ counts.correct) / (weights @ counts.pairs)', OF_ACCURACY),
    Mutant("what people tied does not count (M4)", ACCURACY, '"released": (weights @ counts.correct) / (weights @ counts.pairs)',
           '"released": (weights @ counts.correct) / (weights @ counts.strict)', OF_ACCURACY),
    Mutant("what the model ties is right", ACCURACY, "correct = strict & (people == model)", "correct = strict & (people * model >= 0)",
           OF_ACCURACY),
    Mutant("pairs are resampled, not prompts", ACCURACY, "_, group = np.unique(np.asarray(prompts), return_inverse=True)",
           "group = np.arange(len(prompts))", OF_ACCURACY),
    Mutant("reliability is the paper's whatever was trained", REPORT, "evaluation.likelihood or LossConfig())",
           "LossConfig())", f"{OF_EVALUATION} -k reliability"),
    Mutant("the headline's noise is shared", REPORT, "evaluation.draws_of(shared=False), prompts)", "evaluation.draws_of(shared=True), prompts)",
           f"{OF_EVALUATION} -k by_two"),
    Mutant("an evaluation names images by their place", EVALUATOR, "names=[image for _, image in rows],", "", f"{OF_EVALUATION} -k by_two"),
    Mutant("records' noise goes by the wrong image", PAIRS, "draw.keys([image.name for image in images])",
           "draw.keys([image.name for image in images[::-1]])", "tests/evaluation/test_pairs.py -k public"),
    Mutant("chosen and rejected change places in an evaluation of records", EVALUATOR, "np.stack([one.chosen, one.rejected])",
           "np.stack([one.rejected, one.chosen])", f"{OF_EVALUATION} -k latents"),
    Mutant("only the first draw of records counts", EVALUATOR, "[scorer.run(params, levels, draw, bar.update) for draw in draws]",
           "[scorer.run(params, levels, draws[0], bar.update) for _ in draws]", f"{OF_EVALUATION} -k latents"),
    Mutant("a model's training sizes are forgotten", "dinalrm_jax/weights/pretrained.py",
           '"image_sizes": [list(size) for size in image_sizes],', '"image_sizes": [],', f"{OF_SCORING} -k training_sizes"),
    Mutant("images are scored far from the training sizes", "dinalrm_jax/evaluation/scoring.py", "if model.image_sizes:",
           "if False:", f"{OF_SCORING} -k training_sizes"),
    Mutant("the farthest training size is taken", "dinalrm_jax/data/images.py", "key=lambda area: abs(",
           "key=lambda area: -abs(", f"{OF_SCORING} -k trained_size"),
    Mutant("nobody hears of a strange size", "dinalrm_jax/reward_model.py", "self._warn_of_size((latents.shape[1], latents.shape[2]))", "pass",
           f"{OF_SCORING} -k training_sizes"),
    Mutant("lost digits come back in silence", "dinalrm_jax/reward_model.py", "array.dtype.itemsize < wanted.itemsize",
           "False", "tests/test_reward_model.py -k digits"),
    Mutant("reward_fn takes latents of any layout", "dinalrm_jax/reward_model.py", "            spec.validate_rows(latents, prompt)\n", "",
           "tests/test_reward_model.py -k not_a_prompt"),
    Mutant("HPSv2 reads the middle of an image", "dinalrm_jax/encoders/clip_files.py", 'fit="pad"', 'fit="crop"', JUDGES),
    Mutant("queries and keys in the other's place", "dinalrm_jax/encoders/clip_files.py", 'for part, third in zip("qkv", np.split(array, 3))',
           'for part, third in zip("kqv", np.split(array, 3))', f"{JUDGES} -k hpsv2"),
    Mutant("HPSv2 with the quick GELU", "dinalrm_jax/encoders/clip_files.py", '"hidden_act": "gelu"', '"hidden_act": "quick_gelu"', JUDGES),
    Mutant("HPSv2 with a temperature", "dinalrm_jax/evaluation/judges/clip.py", 'cosine if kind == "pickscore" else cosine', "cosine", JUDGES),
    Mutant("a directory without a tokenizer has an empty one", "dinalrm_jax/encoders/tokenizers.py", "if not any(", "if False and not any(",
           "tests/encoders/test_encoders.py -k incomplete"),
]  # fmt: skip
