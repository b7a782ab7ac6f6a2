"""The sequential update, against least squares on the inputs that complete passes of both models show."""

import copy
import weakref
from importlib.resources import as_file, files

import pytest
import torch

from llm_surgeon import prune
from llm_surgeon.checkpoint import load_model
from llm_surgeon.config.prune import PruneConfig
from llm_surgeon.curvature.estimate import estimate_curvature
from llm_surgeon.curvature.stages import Stage, stages
from llm_surgeon.data.calibration import Calibration, calibration_windows, evaluation_windows
from llm_surgeon.data.documents import read_text
from llm_surgeon.data.tokens import tokenize
from llm_surgeon.distributed import Ranks
from llm_surgeon.evaluation.perplexity import perplexity
from llm_surgeon.methods import sequential
from llm_surgeon.methods.select import Selection
from llm_surgeon.methods.sequential import token_weights, update_sequentially
from llm_surgeon.models.decoder import PrunableLinear, find_decoder
from llm_surgeon.models.passes import run_model
from llm_surgeon.models.writers import find_writers
from llm_surgeon.shots import run as shots_run
from tests.surgeon.tiny_models import NAMES, VOCABULARY, build

DOUBLE = torch.float64
TOKENS = torch.randint(3, VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(0))
# What reads the residual stream right before the second writer of a block adds to it; None: in parallel with the first.
SECOND = {"llama": "post_attention_layernorm", "opt": "final_layer_norm", "gpt2": "ln_2", "gpt_neox": None}
KINDS = {
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "opt": ("self_attn.out_proj", "fc2"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
}


def padded_tokens():
    mask = torch.ones_like(TOKENS, dtype=torch.bool)
    mask[1, 15:] = False
    mask[3, :5] = False
    return Calibration(TOKENS, mask)


def sweep(model, data, config):
    """The update of :func:`llm_surgeon.prune`, without the rest."""
    decoder = find_decoder(model)
    weighted = config.token_weights is not False
    curvature = estimate_curvature(model, decoder, data, batch_size=4, inputs=False, squared_norms=weighted)
    before = [Selection(torch.ones(x.rows, x.columns, dtype=torch.bool)) for x in decoder.linears]
    writers = find_writers(model, decoder)
    for _ in update_sequentially(model, decoder, data, curvature, before, config, writers=writers, batch_size=4):
        pass


def seen(model, data, places):
    """Inputs and outputs of modules in one pass over all of ``data``, as rows."""
    found = {}

    def note(name, args, kwargs, output):
        x = args[0] if args else kwargs["hidden_states"]
        rows = data.input_ids.numel()
        found[name] = (x.reshape(rows, -1), output.reshape(rows, -1) if isinstance(output, torch.Tensor) else None)

    handles = [
        module.register_forward_hook(lambda _, a, k, y, name=name: note(name, a, k, y), with_kwargs=True)
        for name, module in places.items()
    ]
    with torch.no_grad():
        run_model(model, data.input_ids, data.attention_mask)
    for handle in handles:
        handle.remove()
    return found


def stream_before(name, kind, depth, found):
    """The residual stream before a writer adds to it."""
    block = found[f"block {depth}"][0]
    if kind == KINDS[name][0]:
        return block
    return block + found[f"{depth} {KINDS[name][0]}"][1] if SECOND[name] is None else found[f"{depth} second"][0]


def places(model, name):
    decoder = find_decoder(model)
    chosen = {f"{linear.depth} {linear.kind}": linear.module for linear in decoder.linears}
    for depth, block in enumerate(decoder.blocks):
        chosen[f"block {depth}"] = block
        if SECOND[name] is not None:
            chosen[f"{depth} second"] = block.get_submodule(SECOND[name])
    return chosen


def least_squares(W, inputs, wanted, w, damping):
    """``argmin E[w |T x - y|²] + λ mean(diag E[w x xᵀ]) |T - W|²`` by an orthogonal factorisation."""
    root = (w / w.sum()).sqrt()[:, None]
    X, Y = inputs * root, wanted * root
    ridge = (damping * X.square().sum(dim=0).mean()).sqrt() * torch.eye(X.shape[1], dtype=DOUBLE)
    return torch.linalg.lstsq(torch.cat([X, ridge]), torch.cat([Y, ridge @ W.T])).solution.T


def target_of(W, inputs, wanted, lack, w, config):
    """What a linear aims at: one fit to its dense outputs, and one to the stream's ``lack``, if it writes to it."""
    target = least_squares(W, inputs, wanted, w, config.target_damping)
    if lack is None:
        return target
    return target + config.residual_weight * least_squares(0.0 * W, inputs, lack, w, config.residual_damping)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("padded, weighted, rho", [(False, True, 1.0), (True, True, 0.6), (True, False, 1.0)])
def test_targets_are_least_squares_solutions(name, padded, weighted, rho, monkeypatch):
    """At its turn a linear aims at the dense model's output and stream, everything before it being pruned already."""
    data = padded_tokens() if padded else Calibration(TOKENS)
    damping = {"target_damping": 0.05, "residual_damping": 0.02}
    config = PruneConfig(update="sequential", token_weights=weighted, residual_weight=rho, **damping)
    model = build(name, DOUBLE)
    dense = copy.deepcopy(model)
    before = seen(dense, data, places(dense, name))
    compared, targets = [], sequential._update

    def compare(linear, target, factors, *rest):
        key = f"{linear.depth} {linear.kind}"
        after = seen(model, data, places(model, name))
        inputs, wanted = after[key][0], before[key][1]
        if linear.has_bias:
            inputs = torch.cat([inputs, torch.ones_like(inputs[:, :1])], dim=1)
        lack = None
        if linear.kind in KINDS[name]:
            streams = [stream_before(name, linear.kind, linear.depth, found) for found in (before, after)]
            lack = (streams[0] - streams[1])[weights[linear.input_group].reshape(-1) > 0]
        w = weights[linear.input_group].reshape(-1)
        expected = target_of(linear.matrix(), inputs[w > 0], wanted[w > 0], lack, w[w > 0], config)
        torch.testing.assert_close(target, expected, rtol=1e-5, atol=1e-5)
        A = (inputs * w[:, None]).nan_to_num().T @ inputs.nan_to_num() / w.sum()
        torch.testing.assert_close(factors.a.undamped(), A, rtol=1e-5, atol=1e-6)
        compared.append(linear.name)
        return targets(linear, target, factors, *rest)

    decoder = find_decoder(model)
    curvature = estimate_curvature(dense, find_decoder(dense), data, batch_size=6, squared_norms=True)
    real = torch.ones_like(TOKENS, dtype=torch.bool) if data.attention_mask is None else data.attention_mask
    weights = {linear.input_group: torch.zeros(TOKENS.shape, dtype=DOUBLE) for linear in decoder.linears}
    for linear in decoder.linears:
        norms = curvature.squared_norms[linear.name]
        weights[linear.input_group] += (norms / norms[real].mean()).clamp_max(1.0) if weighted else real.double()
    monkeypatch.setattr(sequential, "_update", compare)
    sweep(model, data, config)
    assert compared == [linear.name for linear in decoder.linears]


@pytest.mark.parametrize("name", NAMES)
def test_with_nothing_pruned_before_the_target_is_the_weight(name, monkeypatch):
    model = build(name)
    first = {}
    update = sequential._update
    monkeypatch.setattr(
        sequential,
        "_update",
        lambda linear, target, *rest: (
            first.setdefault(linear.name, (linear.matrix(), target)) and update(linear, target, *rest)
        ),
    )
    sweep(model, Calibration(TOKENS), PruneConfig(update="sequential"))
    W, target = next(iter(first.values()))
    assert torch.equal(target, W)
    W, target = list(first.values())[-1]
    assert float((target - W).norm()) > 1e-3 * float(W.norm())


def test_the_objective_is_that_of_the_joint_update_around_the_target():
    """``½ E[w |Ŵ x̂ - y|²_G] + ½ λ |Ŵ - W|²_G`` exceeds its least value by the quadratic form of ``Ŵ - T``."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=DOUBLE)

    R, C, N, damping = 4, 5, 40, 0.3
    W, e, x, dense, root = random(R, C), random(N, R), random(N, C), random(N, C), random(N, 1)
    G = random(R, R)
    G = G @ G.T
    A, cross, residual = ((root * each).T @ (root * x) / N for each in (x, dense, e))
    stage = Stage([one_linear(W)], A, cross, {"l": residual})
    options = {"target_damping": damping, "residual_damping": damping, "residual_weight": 0.7}
    config = PruneConfig(update="sequential", **options)
    T, factor = sequential.Targets(stage, config).of(*stage.readers)
    torch.testing.assert_close(factor.undamped(), A)
    wanted, ridge = dense @ W.T + 0.7 * e, damping * A.diagonal().mean()

    def objective(V):
        error = root * (x @ V.T - wanted)
        return 0.5 * ((error @ G * error).sum() / N + ridge * torch.trace((V - W).T @ G @ (V - W)))

    # The stationary point of the same objective as one system in vec(V).
    F = torch.kron(G, A + ridge * torch.eye(C, dtype=DOUBLE))
    right = G @ (W @ cross + 0.7 * residual + ridge * W)
    torch.testing.assert_close(T, torch.linalg.solve(F, right.flatten()).view(R, C), rtol=1e-9, atol=1e-9)
    V = random(R, C)
    excess = 0.5 * (V - T).flatten() @ F @ (V - T).flatten()
    torch.testing.assert_close(objective(V) - objective(T), excess, rtol=1e-9, atol=1e-9)


def test_ranks_that_own_no_reader_begin_its_target():
    """Of three ranks the second and third have nothing else to do: one begins, the owner factorises."""
    generator = torch.Generator().manual_seed(0)
    x, W = (torch.randn(rows, 5, generator=generator, dtype=DOUBLE) for rows in (20, 4))
    stage = Stage([one_linear(W)], x.T @ x, x.T @ (x + 0.1), {})
    aims, turns = sequential.Targets(stage, PruneConfig(update="sequential")), []

    class Recorded(Ranks):
        count = 3

        def spread(self, items, owner, function):
            turns.extend(owner(item) for item in items)
            return [function(item) for item in items]

    begun = sequential.begun_by_others(Recorded(), stage.readers, lambda _: 0, aims)
    assert turns == [1, 0]
    assert torch.equal(aims.of(stage.readers[0], begun["l"].clone())[0], aims.of(stage.readers[0])[0])
    assert float((begun["l"] - W).norm()) > 1e-3
    assert sequential.begun_by_others(Ranks(), stage.readers, lambda _: 0, aims) == {}


def one_linear(W):
    module = torch.nn.Linear(W.shape[1], W.shape[0], bias=False, dtype=W.dtype)
    module.weight.data.copy_(W)
    return PrunableLinear("l", module, 0, "l", "l")


def test_weights_of_tokens():
    mask = torch.tensor([[True, True, True, True], [True, True, False, False]])
    data = Calibration(torch.ones(2, 4, dtype=torch.long), mask)
    first = torch.tensor([[0.0, 1.0, 1.0, 10.0], [0.0, 0.0, 0.0, 0.0]])  # mean 2
    second = torch.tensor([[3.0, 0.0, 0.0, 0.0], [0.0, 3.0, 0.0, 0.0]])  # mean 1
    expected = torch.tensor([[1.0, 0.5, 0.5, 1.0], [0.0, 1.0, 0.0, 0.0]])
    assert torch.equal(token_weights([first, second], data), expected)
    assert torch.equal(token_weights([first, torch.zeros(2, 4)], data)[1], torch.zeros(4))
    for nothing in ([], [torch.zeros(2, 4)]):
        assert torch.equal(token_weights(nothing, data), mask.float())
    assert torch.equal(token_weights([], Calibration(TOKENS)), torch.ones(TOKENS.shape))


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_padding_does_not_count(name, weighted):
    results = []
    for filler in (0, 7):
        data = padded_tokens()
        data = Calibration(torch.where(data.attention_mask, data.input_ids, filler), data.attention_mask)
        model = build(name, DOUBLE)
        sweep(model, data, PruneConfig(update="sequential", token_weights=weighted))
        results.append(model.state_dict())
    for key, value in results[0].items():
        torch.testing.assert_close(value, results[1][key], rtol=1e-6, atol=1e-8, msg=key)


@pytest.mark.parametrize("name", [*NAMES, "gpt_neo"])
def test_models_are_2_4(name):
    model = build(name)
    report = prune(model, TOKENS, config=PruneConfig(update="sequential"))
    for linear in find_decoder(model).linears:
        assert bool(((linear.weight == 0).unflatten(1, (-1, 4)).sum(dim=2) == 2).all()), linear.name
    (shot,) = report.shots
    assert shot.sparsity == 0.5
    assert 0.0 < shot.predicted_increase < 100.0
    assert {trace.layer for trace in shot.solver} == {linear.name for linear in find_decoder(model).linears}


def hidden_states(model, data):
    """After the last block, of real tokens."""
    real = torch.ones_like(TOKENS, dtype=torch.bool) if data.attention_mask is None else data.attention_mask
    with torch.no_grad():
        return run_model(model.base_model, data.input_ids, data.attention_mask)[0][real].double()


@pytest.mark.parametrize(
    "structure, dtype, padded",
    [("2:4", torch.bfloat16, True), ("unstructured", DOUBLE, False), ("unstructured", torch.float32, True)],
)
@pytest.mark.parametrize("name", [*NAMES, "gpt_neo", "gemma2", "gemma4_text", "gemma4_shared", "ctrl"])
def test_every_kind_of_model_is_updated(name, structure, dtype, padded):
    """It stays nearer to the dense model than by the same zeros alone."""
    data = padded_tokens() if padded else Calibration(TOKENS)
    dense, model = build(name, dtype), build(name, dtype)
    report = prune(model, data, structure=structure, update="sequential", shots=1)
    masked = copy.deepcopy(dense)
    zeros = 0
    for linear, other in zip(find_decoder(model).linears, find_decoder(masked).linears, strict=True):
        pruned = linear.weight == 0
        other.weight.masked_fill_(pruned, 0.0)
        zeros += int(pruned.sum())
    assert zeros == sum(layer.removed for layer in report.layers)
    assert zeros == sum(layer.weights for layer in report.layers) / 2
    expected = hidden_states(dense, data)
    errors = [float((hidden_states(each, data) - expected).norm() / expected.norm()) for each in (model, masked)]
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_single_weights_keep_the_counts_of_one_threshold(dtype):
    """Layers lose as many weights as without the update, which are others, though."""
    removed = []
    for update in ("joint", "sequential"):
        model = build("opt", dtype)
        report = prune(model, TOKENS, structure="unstructured", sparsity=0.6, update=update, shots=1)
        removed.append([layer.removed for layer in report.layers])
        zeros = [int((linear.weight == 0).sum()) for linear in find_decoder(model).linears]
        assert zeros == removed[-1]
        assert report.shots[0].threshold > 0.0
    assert removed[0] == removed[1]
    assert len(set(removed[0])) > 2


def test_shots_before_the_sweep_tell_how_many_weights_go(monkeypatch):
    """They leave no other trace: the sweep begins at the dense weights."""
    dense, removed, first = build("opt"), [], []
    update = sequential._update
    monkeypatch.setattr(
        sequential,
        "_update",
        lambda linear, target, *rest: first.append((linear.matrix(), target)) or update(linear, target, *rest),
    )
    for options in ({"update": "joint", "swaps": 0, "max_iterations": 8}, {"update": "sequential"}):
        model = copy.deepcopy(dense)
        report = prune(model, TOKENS, structure="unstructured", sparsity=0.6, shots=3, **options)
        removed.append([layer.removed for layer in report.layers])
    assert removed[0] == removed[1]
    linears = find_decoder(dense).linears
    assert len(first) == len(linears)
    for linear, (W, _) in zip(linears, first, strict=True):
        assert torch.equal(W, linear.matrix())
    assert torch.equal(*first[0])


def test_the_predictions_of_all_shots_sum_up_to_that_of_the_sweep(monkeypatch):
    """What it makes dense again does not count."""
    increases, update = [], sequential._update

    def noted(*arguments):
        new = update(*arguments)
        increases.append(float(new.increase))
        return new

    monkeypatch.setattr(sequential, "_update", noted)
    report = prune(build("opt"), TOKENS, structure="unstructured", update="sequential", shots=3)
    assert report.predicted_increase == pytest.approx(sum(increases))


@pytest.mark.parametrize(
    "given, count, expected", [(None, 63, False), (None, 64, True), (True, 1, True), (False, 99, False)]
)
def test_tokens_are_weighed_where_there_are_many(given, count, expected, monkeypatch):
    """So many for each input of the widest linear, of the tiny model 48."""
    windows = torch.randint(3, VOCABULARY, (count, 48), generator=torch.Generator().manual_seed(0))
    asked = []
    estimate = shots_run.estimate_curvature
    monkeypatch.setattr(
        shots_run,
        "estimate_curvature",
        lambda *args, **options: asked.append(options["squared_norms"]) or estimate(*args, **options),
    )
    model = build("llama")
    assert max(linear.columns for linear in find_decoder(model).linears) == 48
    report = prune(model, windows, token_weights=given, gradient_steps=0)
    assert asked == [expected] and report.config["token_weights"] is expected


def test_the_sweep_follows_the_dense_model_more_closely():
    """The hidden states after the last block are nearer to the dense model's than by an update of all at once."""
    dense = build("llama")
    errors = {}
    for update in ("joint", "sequential"):
        model = copy.deepcopy(dense)
        prune(model, TOKENS, update=update, shots=1, **({"token_weights": False} if update == "sequential" else {}))
        with torch.no_grad():
            errors[update] = float((model.model(TOKENS)[0] - dense.model(TOKENS)[0]).norm())
    assert errors["sequential"] < 0.8 * errors["joint"]


def moments(name, dtype, device="cpu", **options):
    """Moments of a block's last stage, in a block whose other linears are too small by a tenth."""
    model = build(name, dtype).to(device)
    decoder = find_decoder(model)
    data, last = padded_tokens(), [linear for linear in decoder.linears if linear.depth == 0][-1]
    w = token_weights([torch.arange(TOKENS.numel(), device=device).view(TOKENS.shape).float()], data)
    w *= data.attention_mask.to(device)
    scales = dict.fromkeys((f"{decoder.linears[0].name.split('.0.')[0]}.0.{kind}" for kind in KINDS[name]), 1.0)
    for stage in stages(model, decoder, data, lambda _: w, writers=scales, batch_size=4, **options):
        if last in stage.readers:
            return [part.double().cpu() for part in (stage.A, stage.cross, *stage.residual.values())]
        for linear in stage.readers:
            linear.write(0.9 * linear.matrix())
    raise AssertionError


def relative_error(actual, expected):
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_moments_are_summed_in_float32(name):
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 0.03), (torch.float16, 0.005)):
        for actual, expected in zip(moments(name, dtype), moments(name, DOUBLE), strict=True):
            assert relative_error(actual, expected) < bound


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_blocks_may_compute_in_16_bits(name):
    exact, rounded = moments(name, torch.float32), moments(name, torch.float32, compute_dtype=torch.bfloat16)
    assert len(exact) == 3
    for actual, expected in zip(rounded, exact, strict=True):
        assert 1e-5 < relative_error(actual, expected) < 0.03


@pytest.mark.slow
@pytest.mark.parametrize(
    "structure, weighted, at_once, gain", [("2:4", False, 27.92, 0.01), ("unstructured", True, 23.99, 0.005)]
)
def test_a_trained_model_loses_less_than_by_an_update_of_all_at_once(structure, weighted, at_once, gain):
    """The model of the demo and its few windows."""
    results = {}
    with as_file(files("llm_surgeon.demo") / "assets") as assets:
        for update, options in {"joint": {}, "sequential": {"token_weights": weighted}}.items():
            model, tokenizer, _ = load_model(str(assets / "model"), device=torch.device("cpu"))
            train = read_text(str(assets / "wikitext2-train-slice.txt"), "calibration")
            test = read_text(str(assets / "wikitext2-test-slice.txt"), "evaluation")
            calibration = calibration_windows(tokenize(train, tokenizer), 32, 256, seed=0)
            prune(model, calibration, structure=structure, update=update, shots=1, **options)
            results[update] = perplexity(model, evaluation_windows(tokenize(test, tokenizer), 256)[:64])
    assert results["joint"] == pytest.approx(at_once, rel=0.01)
    assert results["sequential"] < (1.0 - gain) * results["joint"]


def test_the_model_is_as_it_was_after_a_failure(monkeypatch):
    model = build("llama").train()
    forwards = [module.forward for module in model.modules()]

    def fail(*_):
        raise RuntimeError("no update")

    monkeypatch.setattr(sequential, "_update", fail)
    with pytest.raises(RuntimeError, match="no update") as caught:  # which keeps what was under way alive
        sweep(model, Calibration(TOKENS), PruneConfig(update="sequential"))
    assert caught.tb is not None and model.training
    assert [module.forward for module in model.modules()] == forwards


def test_updates_are_let_go_once_they_are_written(monkeypatch):
    """All of them in float32 would be four times as large as a model in 16 bits."""
    made, alive = [], []
    update = sequential.remove_and_compensate

    def noted(*arguments):
        alive.append(sum(reference() is not None for reference in made))
        new = update(*arguments)
        made.append(weakref.ref(new.weight))
        return new

    monkeypatch.setattr(sequential, "remove_and_compensate", noted)
    prune(build("llama"), TOKENS, update="sequential")
    assert len(made) == 14 and max(alive) == 0
