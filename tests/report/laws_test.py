"""Laws of the mixture: fits against other ways to compute them, and intervals against truths that are known."""

import csv
import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from scipy import stats

from codellm_jax import cli
from codellm_jax.report import laws
from codellm_jax.report.families import Losses, Points, exponential, gaussian_process, linear
from codellm_jax.report.fitted import fit_sweep, predict
from codellm_jax.report.law_files import section
from codellm_jax.report.laws import fit_family
from codellm_jax.report.mixing import analyse, parse_objective
from codellm_jax.report.noise import cells_of, moderated
from codellm_jax.report.optimum import between, lines_to_paste, lowest
from codellm_jax.report.sweeps import read_sweep
from codellm_jax.results.files import write_result
from codellm_jax.study.arms import Study, expand

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = ROOT.parent / "shared" / "data" / "mixing_laws" / "pile_two_domains.csv"
_spec = importlib.util.spec_from_file_location("benchmarks_laws", ROOT / "benchmarks" / "laws.py")
assert _spec and _spec.loader
simulation = importlib.util.module_from_spec(_spec)
sys.modules["benchmarks_laws"] = simulation
_spec.loader.exec_module(simulation)
KINDS = {kind.name: kind for kind in simulation.KINDS}


def points_of(second) -> Points:
    second = np.asarray(second, float)
    return Points(np.stack([1 - second, second], axis=1), np.zeros((len(second), 0)), np.zeros(len(second)))


def one_seed(values) -> Losses:
    n = len(values)
    return Losses(np.asarray(values, float), np.ones(n), np.zeros(n), np.ones(n), np.full(n, np.inf))


def write_run(folder: Path, name: str, share: float, text: float, code: float, seed: int = 0, size: float = 1e6,
              steps: int = 100, evaluations: int = 1, vocabulary: str = "v") -> None:
    """A run directory as training leaves it, as far as laws read it."""
    run = folder / "runs" / name
    run.mkdir(parents=True)
    rows = {"text.books": round(1000 * (1 - share)), "code.github": round(1000 * share)}
    (run / "provenance.json").write_text(json.dumps({
        "seed": seed, "parameters": size, "finished": True, "data": {"text.books": "ab", "code.github": "cd"},
        "ledger": {"stage": "pretraining", "vocabulary_hash": vocabulary, "rows": rows, "before": [],
                   "tokens": {source: 256 * count for source, count in rows.items()},
                   "epoch_rows": {source: 10**6 for source in rows}, "phases": [{"start": 0, "rows": rows}]}}))
    (run / "metrics.jsonl").write_text("".join(json.dumps({
        "step": steps * (k + 1) // evaluations, "split": "eval", "loss/text": text + 0.4 * (evaluations - 1 - k),
        "loss/text.books": text + 0.4 * (evaluations - 1 - k), "loss/code": code}) + "\n" for k in range(evaluations)))


def write_study(folder: Path, shares=(0.0, 0.1, 0.25, 0.5, 0.75, 1.0), seeds: int = 3, sizes=(1e6,),
                noise: float = 0.01, outlier: str = "", evaluations: int = 1) -> Path:
    dice = np.random.default_rng(5)
    for size in sizes:
        for share in shares:
            for seed in range(seeds):
                name = f"RATE-{share:g}{f'-{size:g}' if len(sizes) > 1 else ''}.seed{seed}"
                fall = (size / 1e6) ** -0.3
                text = 2 + fall + 0.5 * np.exp(-3 * (1 - share)) + dice.normal(0, noise) + 0.2 * (name == outlier)
                code = 1 + fall + 0.8 * np.exp(-4 * share) + dice.normal(0, noise)
                write_run(folder, name, share, text, code, seed, size, evaluations=evaluations)
    return folder


def test_a_share_left_out_in_closed_form_is_that_of_a_fit_without_it(monkeypatch):
    monkeypatch.setattr(laws, "LARGE", 1e4)  # as good as no prior, which least squares has not
    dice = np.random.default_rng(0)
    second = np.sort(dice.random(9))
    values = 2 - second + dice.normal(0, 0.05, 9)
    fit = fit_family(linear(2), points_of(second), np.arange(9), one_seed(values))
    for out in range(9):
        rest = np.arange(9) != out
        slope, intercept = np.polyfit(second[rest], values[rest], 1)
        assert fit.left_out[out] == pytest.approx(intercept + slope * second[out], abs=1e-6)
        # And its density is Student's, of the prediction of a further run.
        x = second[rest] - second[rest].mean()
        squares = ((values[rest] - intercept - slope * second[rest]) ** 2).sum()
        scale = np.sqrt(squares / 6 * (1 + 1 / 8 + (second[out] - second[rest].mean()) ** 2 / (x**2).sum()))
        expected = stats.t.logpdf(values[out], 6, intercept + slope * second[out], scale)
        assert fit.densities[out] == pytest.approx(expected, abs=1e-5)


def test_the_gaussian_process_is_that_of_scikit_learn():
    kernels = pytest.importorskip("sklearn.gaussian_process.kernels")
    from sklearn.gaussian_process import GaussianProcessRegressor

    second, asked = np.array([0.0, 0.1, 0.25, 0.5, 0.75, 1.0]), np.linspace(0, 1, 11)
    values = np.sin(4 * second)
    family = gaussian_process(points_of(second).shares, with_linear=False)
    fit = fit_family(family, points_of(second), np.arange(6), one_seed(values))
    best = int(fit.weights.argmax())
    length, amplitude = fit.thetas[best]
    # A mean of its own is a constant kernel, very large.
    other = GaussianProcessRegressor(
        kernels.ConstantKernel(1e5) + kernels.ConstantKernel(amplitude**2) * kernels.Matern(length, nu=2.5), alpha=1.0,
        optimizer=None).fit(second[:, None], values)
    ours = family.features(points_of(asked), fit.thetas[[best]])[0] @ fit.coefficients[best]
    np.testing.assert_allclose(ours, other.predict(asked[:, None]), atol=5e-3)


def test_noise_differs_between_shares_only_where_seeds_say_so():
    dice = np.random.default_rng(1)
    shares = points_of(np.linspace(0, 1, 8)).shares
    equal = (dice.normal(size=(8, 4)).var(axis=1, ddof=1)) * 3
    variance, degrees = moderated(equal, np.full(8, 3), shares)
    assert stats.bartlett(*dice.normal(size=(8, 4))).pvalue > 0.05 and (variance == 1).all() and np.isinf(degrees).all()
    loud = equal * np.where(np.arange(8) == 7, 400, 1)
    variance, degrees = moderated(loud, np.full(8, 3), shares)
    assert variance[7] > 20 * variance[:7].max() and np.isfinite(degrees).all()
    assert np.average(variance) == pytest.approx(1)


def test_cells_hold_means_and_squares():
    losses = cells_of(np.array([1.0, 3.0, np.nan, 5.0]), np.array([0, 0, 1, 1]), points_of([0, 1]).shares, np.ones(4))
    assert losses.mean.tolist() == [2, 5] and losses.runs.tolist() == [2, 1] and losses.squares.tolist() == [2, 0]


@pytest.mark.slow
@pytest.mark.parametrize("name, studies", [("six shares, 3 seeds", 30), ("one seed, 10 shares", 20),
                                           ("noise 20 times larger", 20), ("three sources, 20 runs", 6)])
def test_intervals_hold_the_truth(name, studies):
    found = simulation.tally(KINDS[name], studies)
    # Of the loss over a study's shares together, whose errors go together: a mean of `studies` such parts.
    assert 0.90 <= np.mean(found.law) <= 0.99
    # An interval that is right 92 times in a hundred does worse than this once in a thousand.
    assert round(sum(found.best)) >= stats.binom.ppf(0.001, studies, 0.92)
    assert found.falsely <= stats.binom.isf(0.001, 2 * studies, 0.02)


@pytest.mark.slow
def test_an_edge_is_called_one_and_no_difference_cannot_be_told():
    edge, flat = (simulation.tally(KINDS[name], 20) for name in ("best at the edge", "no difference"))
    assert edge.said("interior", False) <= 0.08 and edge.said("edge", False) > 0.5
    assert flat.said("cannot tell", False) >= 0.8 and flat.said("interior", False) <= 0.08


@pytest.mark.slow
def test_outliers_are_named_and_others_are_not():
    found = simulation.tally(KINDS["an outlier"], 20)
    assert found.named >= 0.85 * found.planted and found.falsely <= 3 and np.mean(found.law) > 0.88


def test_a_study_is_answered_with_its_outlier_and_its_files(tmp_path, capsys):
    study = write_study(tmp_path / "study", outlier="RATE-0.5.seed1", evaluations=2)
    assert cli.main(["laws", str(study), "--objective=text:0.5,code:0.5"]) == 0
    told = capsys.readouterr().out
    saved = json.loads((study / "report" / "laws.json").read_text())
    # d/dr of 0.5 exp(-3 (1 - r)) + 0.8 exp(-4 r) is 0 at:
    truth = (np.log(3.2 / 1.5) + 3) / 7
    low, high = saved["best"]["intervals"]["code"]
    assert saved["best"]["verdict"] == "interior" and low <= truth <= high and high - low < 0.1
    assert "The best share of code is" in told and "RATE-0.5.seed1" in told
    assert [(line["run"], line["loss"]) for line in saved["outliers"]] == [("RATE-0.5.seed1", "text")]
    assert saved["outliers"][0]["deviation"] == pytest.approx(0.2, abs=0.03)
    assert saved["losses"] == ["text", "code"]  # text.books is all of text, and says nothing more
    assert (study / "report" / "laws.svg").read_bytes().startswith(b"<?xml")
    # The same runs by way of Olmix's files come to the same laws.
    again = tmp_path / "files"
    again.mkdir()
    for name in ("ratios.csv", "metrics.csv"):
        (study / "report" / name).rename(again / name)
    (again / "asked.csv").write_text("text,code\n0.6,0.4\n")
    assert cli.main(["laws", str(again), f"--predict={again / 'asked.csv'}"]) == 0
    other = json.loads((again / "report" / "laws.json").read_text())
    assert other["best"]["shares"]["code"] == pytest.approx(saved["best"]["shares"]["code"], abs=0.02)
    (line,) = csv.DictReader((again / "report" / "predictions.csv").read_text().splitlines())
    assert float(line["text low"]) < 3 + 0.5 * np.exp(-1.8) < float(line["text high"])
    assert float(line["text run low"]) < float(line["text low"]) and float(line["text run high"]) > float(
        line["text high"])


def test_a_size_beyond_all_runs_is_marked_and_tested(tmp_path, capsys):
    study = write_study(tmp_path / "study", (0.0, 0.2, 0.4, 0.6, 0.8), 2, (1e6, 3e6, 1e7, 3e7))
    assert cli.main(["laws", str(study), "--size=100M"]) == 0
    told = capsys.readouterr().out
    saved = json.loads((study / "report" / "laws.json").read_text())
    assert saved["extrapolated"] == ["size"] and "EXTRAPOLATED" in told and "mispredicted by" in told
    assert [line["axis"] for line in saved["left_out"]] == ["size"]
    for line in saved["predictions"]:
        low, high = line["losses"]["text"]["interval"]
        assert low < 2 + 100**-0.3 + 0.5 * np.exp(-3 * line["shares"]["text"]) < high


def test_further_runs_make_arms_of_a_study_and_narrow_the_interval(tmp_path):
    study = write_study(tmp_path / "study", (0.0, 0.3, 0.6, 0.9), 2, noise=0.1)
    sweep = read_sweep(str(study))
    found = analyse(sweep, parse_objective("text:0.5,code:0.5", sweep))
    assert found.best.verdict == "cannot tell" and found.design is not None
    assert found.design.width_then < 0.8 * found.design.width_now
    settings: dict = {}
    exec(lines_to_paste(found.design, sweep.sources, sweep.seeds), settings)
    assert settings["SEEDS"] == [0, 1]
    arms, _ = expand(Study(directory="x", arms={}, more_arms=settings["MORE_ARMS"], seeds=[0, 1],
                           comparison="compute-matched", pretraining_files=[], tuning_files=[], evaluation_files=[]))
    rates = [arm.settings["CODE_RATE"] for arm in arms]
    assert len(rates) == len(found.design.shares) > 0 and not set(rates) & {0.0, 0.3, 0.6, 0.9}


def write_quiz(study: Path, questions: int = 30) -> None:
    """What each run of a study answers to a benchmark, whose bits per byte fall with the share of code."""
    dice = np.random.default_rng(8)
    hard, gain = dice.normal(0, 0.3, questions), dice.normal(0, 0.1, questions)
    for run in sorted((study / "runs").iterdir()):
        rows = json.loads((run / "provenance.json").read_text())["ledger"]["rows"]
        share = rows["code.github"] / sum(rows.values())
        bits = 3 + np.exp(-3 * share) + hard + gain * share + dice.normal(0, 0.02, questions)
        lines = [{"id": str(place), "answer": 0, "correct": float(one < 3.3), "candidates": [
            {"log_likelihood": -np.log(2) * 4 * one, "tokens": 2, "bytes": 4},
            {"log_likelihood": -np.log(2) * 4 * 3.3, "tokens": 2, "bytes": 4}]} for place, one in enumerate(bits)]
        header = {"settings": {"data": "0"}, "checkpoint": {"step": 100}}
        (run / "results").mkdir()
        write_result(epath.Path(run / "results"), "quiz", header, lines, header | {
            "task": "quiz", "metric": "accuracy", "sample": False, "n": questions,
            "value": float(np.mean([line["correct"] for line in lines]))})


def test_a_benchmarks_measure_has_a_law_whose_interval_knows_that_questions_are_few(tmp_path, capsys):
    study = write_study(tmp_path / "study")
    write_quiz(study)
    assert cli.main(["laws", str(study), "--objective=text:1,quiz/accuracy:0.2"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    saved = json.loads((study / "report" / "laws.json").read_text())
    assert saved["losses"] == ["text", "code", "quiz/accuracy", "quiz/bits_per_byte"]
    assert saved["units"]["quiz/bits_per_byte"] == "bits per byte" and saved["units"]["quiz/accuracy"] == "fraction"
    assert saved["objective"] == {"text": 1.0, "quiz/accuracy": -0.2}
    assert "1 x text - 0.2 x quiz/accuracy" in told and "Higher is better for quiz/accuracy" in told
    inside = []
    for line in saved["predictions"]:
        measure = line["losses"]["quiz/bits_per_byte"]
        low, high = measure["interval"]
        inside.append(low < 3 + np.exp(-3 * line["shares"]["code"]) < high)
        # 30 questions whose deviation is 0.3 are a sample; a further run is asked the same ones.
        assert high - low > 2 * 2 * 0.3 / np.sqrt(30) * 0.8
        assert measure["run_interval"][1] - measure["run_interval"][0] < 0.5 * (high - low)
    assert all(inside)
    # Without the questions' file the same means have a law that takes them for all there are.
    sweep = read_sweep(str(study))
    fitted = fit_sweep(dataclasses.replace(sweep, questions={}), (), lambda name: None)
    _, intervals, _ = predict(fitted, fitted.at(sweep.shares), np.zeros(len(sweep.losses)))
    assert np.ptp(intervals[-1], axis=-1).max() < 0.06


def test_overlapping_questions_are_left_out_of_a_law(tmp_path):
    study = write_study(tmp_path / "study", seeds=1)
    write_quiz(study)
    whole = read_sweep(str(study))
    (study / "contamination.json").write_text(json.dumps({"n": 13, "tasks": {"quiz": {"sources": {
        "code.github": {"ids": ["0", "7"]}}}}}))
    clean = read_sweep(str(study))
    kept = [n for n in range(30) if n not in (0, 7)]
    np.testing.assert_array_equal(clean.questions["quiz/bits_per_byte"], whole.questions["quiz/bits_per_byte"][:, kept])
    place = clean.losses.index("quiz/bits_per_byte")
    np.testing.assert_allclose(clean.values[:, place], whole.questions["quiz/bits_per_byte"][:, kept].mean(axis=1))


def test_a_curve_moves_with_its_cells_as_least_squares_does():
    dice = np.random.default_rng(4)
    second, values, moved = np.linspace(0, 1, 8), dice.normal(size=8), dice.normal(0, 0.1, (50, 8))
    points = points_of(second)
    law = laws.fit_law([linear(2), exponential()], points, np.arange(8), one_seed(values))
    still, shifted = (laws.curves(laws.draw([law], count=50, moved=[move]), points)[0] for move in (None, moved))
    for one in laws.draw([law], count=50):
        design = one.fit.family.features(points, one.fit.thetas[[one.theta]])[0]
        expected = (design @ np.linalg.lstsq(design, moved[one.rows].T, rcond=None)[0]).T
        np.testing.assert_allclose(shifted[one.rows] - still[one.rows], expected, atol=0.01)


def test_the_best_of_three_sources_is_found_between_the_runs_and_not_only_at_them():
    """A bowl, whose lowest point no run is near: by hand at (0.5, 0.3, 0.2)."""
    lowest_at = np.array([0.5, 0.3, 0.2])
    found = lowest(np.eye(3), lambda shares: ((shares - lowest_at) ** 2).sum(axis=1)[None])
    np.testing.assert_allclose(found[0], lowest_at, atol=0.003)
    # At an edge, between two corners; and within fewer mixtures than there are.
    found = lowest(np.eye(3), lambda shares: ((shares - [0.7, 0.5, -0.2]) ** 2).sum(axis=1)[None])
    np.testing.assert_allclose(found[0], [0.6, 0.4, 0.0], atol=0.003)
    inner = 0.5 * np.eye(3) + 1 / 6
    found = lowest(inner, lambda shares: ((shares - [1.0, 0.0, 0.0]) ** 2).sum(axis=1)[None])
    np.testing.assert_allclose(found[0], [2 / 3, 1 / 6, 1 / 6], atol=0.003)
    assert between(inner, found[0]) and not between(inner, np.array([0.8, 0.1, 0.1]))


def test_a_best_mixture_beyond_the_runs_is_marked(tmp_path, capsys):
    """Runs of little of the third source, more of which is better."""
    dice = np.random.default_rng(6)
    mixes = dice.dirichlet([4, 4, 1], 24)
    mixes = mixes[mixes[:, 2] < 0.3][:20]
    loss = 2 + np.exp(-4 * mixes[:, 2]) + 0.3 * np.exp(-5 * mixes[:, 0]) + dice.normal(0, 0.002, len(mixes))
    (tmp_path / "ratios.csv").write_text("run,a,b,c\n" + "".join(
        f"r{n},{a},{b},{c}\n" for n, (a, b, c) in enumerate(mixes)))
    (tmp_path / "metrics.csv").write_text("run,loss\n" + "".join(f"r{n},{one}\n" for n, one in enumerate(loss)))
    assert cli.main(["laws", str(tmp_path)]) == 0
    told = " ".join(capsys.readouterr().out.split())
    saved = json.loads((tmp_path / "report" / "laws.json").read_text())
    assert "EXTRAPOLATED: over all mixtures" in told and "within the convex hull" in told
    assert between(mixes, np.array(list(saved["best"]["shares"].values())))
    assert saved["beyond"]["shares"]["c"] > mixes[:, 2].max()
    assert saved["beyond"]["objective"] < saved["best"]["objective"]


def test_a_single_loss_with_a_law_that_only_falls_has_no_interior_optimum(tmp_path, capsys):
    study = write_study(tmp_path / "study")
    assert cli.main(["laws", str(study), "--objective=code:1"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "no interior optimum: the best share is at the edge, the largest share of code" in told
    assert "single loss" in told


@pytest.mark.parametrize("flags, words", [
    (["--objective=maths:1"], "there is no loss maths; the losses are text, code"),
    (["--objective=text:much"], "must be a number"), (["--objective=text"], "as text:0.5"),
    (["--objective=text:0"], "above 0"), (["--size=large"], "such as 125M"), (["--size=9B"], "needs runs of several"),
    (["--predict=nowhere.csv"], "no file")])
def test_a_wrong_flag_is_one_line(tmp_path, capsys, flags, words):
    study = write_study(tmp_path / "study", seeds=1)
    assert cli.main(["laws", str(study), *flags]) == 1
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_what_is_no_sweep_is_one_line(tmp_path, capsys):
    def error_of(folder: Path) -> str:
        assert cli.main(["laws", str(folder)]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "Traceback" not in error
        return error

    assert "no directory" in error_of(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "held-out rows" in error_of(tmp_path / "empty")
    assert "only one share" in error_of(write_study(tmp_path / "one", (0.5,)))
    other = write_study(tmp_path / "other", seeds=1)
    write_run(other, "RATE-0.3.seed0", 0.3, 3.0, 2.0, vocabulary="another")
    assert "have different vocabularies" in error_of(other)
    files = tmp_path / "files"
    files.mkdir()
    (files / "ratios.csv").write_text("run,a,b\nr0,0.5,0.5\nr1,0.2,0.9\n")
    assert "metrics.csv is missing" in error_of(files)
    (files / "metrics.csv").write_text("run,loss\nr0,1\n")
    assert "run r1 is in ratios.csv but not in metrics.csv" in error_of(files)
    (files / "metrics.csv").write_text("run,loss\nr0,1\nr1,2\n")
    assert "the shares of run r1 sum to 1.1" in error_of(files)
    (files / "ratios.csv").write_text("run,a,b\nr0,0.5,0.5\nr1,0.2,x\n")
    assert "'x', which is not a number" in error_of(files)


def test_the_section_of_a_report_says_why_there_are_no_laws(tmp_path):
    assert "only one share" in section(str(write_study(tmp_path / "one", (0.5,))))[-1].text
    titles = [type(block).__name__ for block in section(str(write_study(tmp_path / "several")))]
    assert titles[0] == "Heading" and "Figure" in titles and "Table" in titles


def test_answers_are_the_same_twice(tmp_path):
    sweep = read_sweep(str(write_study(tmp_path / "study", seeds=2)))
    first, second = (analyse(sweep, parse_objective(None, sweep)) for _ in range(2))
    assert (first.intervals == second.intervals).all() and (first.best.intervals == second.best.intervals).all()


@pytest.mark.skipif(not PUBLISHED.exists(), reason="the published sweep is not on this machine")
def test_the_outlying_group_of_a_published_sweep_is_named(tmp_path):
    lines = list(csv.DictReader(PUBLISHED.open()))
    cells = {(line["size"], line["share_github"], line["step"], line["domain"]): line["loss"] for line in lines}
    shares = sorted({(line["size"], line["share_github"]) for line in lines})
    steps = sorted({line["step"] for line in lines}, key=int)
    (tmp_path / "ratios.csv").write_text("run,text,code\n" + "".join(
        f"{size}-{share},{1 - float(share)},{share}\n" for size, share in shares))
    (tmp_path / "metrics.csv").write_text("run,parameters,tokens,web,code\n" + "".join(
        f"{size}-{share},{float(size[:-1]) * 1e6},{step},{cells[size, share, step, 'Pile-CC']},"
        f"{cells[size, share, step, 'Github']}\n" for size, share in shares for step in steps))
    sweep = read_sweep(str(tmp_path))
    found = analyse(sweep, parse_objective(None, sweep))
    named = {(name, sweep.runs[line], sweep.tokens[line]): outlier.deviation for name, line, outlier in found.outliers}
    assert named["web", "160M-0.25", 10000] == pytest.approx(0.08, abs=0.02)
