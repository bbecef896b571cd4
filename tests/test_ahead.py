"""What a step would wait for stays on the device: the same numbers as Megatron's, NeMo's and Lightning's own."""

from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.nemo


@pytest.fixture
def ahead(monkeypatch):
    """The module, with what it replaces put back at the end; one process, whose sums are what it has."""
    import torch

    from nemo_tutorial import ahead

    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, *args, **kwargs: None)
    for owner, name in (
        (ahead.megatron_optimizer, "get_grad_norm_fp32"),
        (ahead.megatron_optimizer, "clip_grad_by_total_norm_fp32"),
        (ahead.Buckets, "check_grads"),
        (ahead.MaskedTokenLossReduction, "reduce"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    yield ahead
    ahead._norms.clear()


def ranks(number, clip_grad=1.0, **more):
    """A trainer and the model's module, of so many ranks."""
    config = SimpleNamespace(clip_grad=clip_grad)
    return SimpleNamespace(world_size=number, **more), SimpleNamespace(optim=SimpleNamespace(config=config))


def parameters(scale, dtype="float32"):
    import torch

    torch.manual_seed(1)
    found = [torch.nn.Parameter(torch.zeros(3, 5, dtype=getattr(torch, dtype))) for _ in range(3)]
    for parameter in found[:2]:  # the last one has no gradient
        parameter.grad = (scale * torch.randn(3, 5)).to(parameter.dtype)
    return found


@pytest.mark.parametrize("scale", [0.01, 10])
def test_gradients_are_clipped_as_megatrons_are(ahead, scale):
    """Bit for bit, whether they are large enough or not."""
    import torch
    from megatron.core.optimizer import clip_grads

    import nemo_tutorial.cpu  # noqa: F401  Megatron's own makes its numbers on a GPU

    ours, theirs = parameters(scale), parameters(scale)
    norm = ahead._norm([parameter.grad for parameter in ours[:2]], None)
    assert norm.dtype == torch.float64 and norm.shape == ()
    expected = clip_grads.get_grad_norm_fp32([parameter.grad for parameter in theirs[:2]])
    assert norm.item() == pytest.approx(expected, rel=1e-7)
    ahead.clip(ours, 1.0, norm)
    before = theirs[0].grad.clone()
    ahead.STOCK_CLIP(theirs, 1.0, expected)
    assert (scale == 10) != theirs[0].grad.equal(before) and ours[2].grad is None
    for parameter, stock in zip(ours[:2], theirs):
        assert parameter.grad.equal(stock.grad)


def test_what_has_no_tensor_of_float32_is_megatrons(ahead, monkeypatch):
    """A norm that is a number, as of several optimizers; gradients in bf16; a rank without parameters; another norm."""
    import torch

    clipped, normed = [], []
    monkeypatch.setattr(ahead, "STOCK_CLIP", lambda *args: clipped.append(args[1:]))
    monkeypatch.setattr(ahead, "STOCK_NORM", lambda *args: normed.append(args[1:]))
    ahead.clip(parameters(1), 1.0, 3.5)
    ahead.clip(parameters(1, "bfloat16"), 1.0, torch.tensor(3.5))
    half = parameters(1)
    for parameter in half:
        parameter.decoupled_grad = parameter.data.bfloat16()
    ahead.clip(half, 1.0, torch.tensor(3.5), True)
    assert clipped == [(1.0, 3.5, False), (1.0, 3.5, False), (1.0, 3.5, True)]
    ahead.gradient_norm([], 2, "group")
    ahead.gradient_norm([torch.ones(2)], 1, "group")
    ahead.gradient_norm([torch.ones(2)], 2, "group")  # on a CPU nothing is ahead
    assert normed == [(2, "group"), (1, "group"), (2, "group")]


def test_the_norms_of_buckets_are_kept_for_the_guard(ahead, monkeypatch):
    import torch

    buckets = [SimpleNamespace(grad_data=torch.tensor(values)) for values in ([3.0, 4.0], [float("inf"), 1.0])]
    group, checked = SimpleNamespace(buckets=buckets[:1]), []
    assert ahead.own_gradients() == {}
    ahead.keep_norms(group, True, False)
    ahead.keep_norms(group, True, False)
    assert ahead.own_gradients()["own_gradients"] == 10
    group.buckets = buckets
    ahead.keep_norms(group, True, False)
    assert ahead.own_gradients()["own_gradients"].isinf()
    monkeypatch.setattr(ahead, "STOCK_CHECK", lambda *args: checked.append(args[1:]))
    ahead._norms.clear()
    ahead.keep_norms(group, False, False)
    ahead.keep_norms(group, True, True)
    assert ahead.own_gradients() == {} and checked == [(True, True)]


@pytest.mark.parametrize("number, clip_grad, checked", [(1, 1.0, False), (1, 0.0, True), (2, 1.0, True)])
def test_a_rank_alone_has_one_norm(ahead, number, clip_grad, checked):
    """That for clipping, if there is clipping: the guard looks at it. Another rank's NaN would be in it as well."""
    import torch

    group = SimpleNamespace(buckets=[SimpleNamespace(grad_data=torch.tensor([3.0, 4.0]))])
    trainer, module = ranks(number, clip_grad, _logger_connector=SimpleNamespace(log_metrics=None))
    ahead.RunAhead().setup(trainer, module, "fit")
    ahead.Buckets.check_grads(group, True, False)
    assert ahead.own_gradients() == ({"own_gradients": 5} if checked else {})


def test_the_mean_loss_is_nemos(ahead, monkeypatch):
    """Of micro batches that have tokens: one without has a loss that is no number."""
    import torch
    from megatron.core import parallel_state

    monkeypatch.setattr(parallel_state, "get_data_parallel_group", lambda **kwargs: None)
    rows = [[6.0, 2.0], [float("nan"), 0.0], [9.0, 4.0]]
    found = [{"loss_sum_and_ub_size": torch.tensor(row)} for row in rows]
    reduction = ahead.MaskedTokenLossReduction()
    assert ahead.reduced_loss(reduction, found) == ahead.STOCK_REDUCE(reduction, found) == 2.5
    legacy = [{"avg": torch.tensor([2.0])}, {"avg": torch.tensor([4.0])}]
    assert ahead.reduced_loss(reduction, legacy) == 3
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    assert ahead.reduced_loss(reduction, []) == 0


def test_only_what_has_the_known_arguments_is_replaced(ahead, monkeypatch):
    """All four of the installed Megatron and NeMo are; an older Megatron's norm has another group, and no buckets."""
    trainer, module = ranks(2, _logger_connector=SimpleNamespace(log_metrics=None))
    ahead.RunAhead().setup(trainer, module, "fit")
    optimizer = ahead.megatron_optimizer
    assert (optimizer.get_grad_norm_fp32, optimizer.clip_grad_by_total_norm_fp32) == (ahead.gradient_norm, ahead.clip)
    assert ahead.Buckets.check_grads is ahead.keep_norms
    assert ahead.MaskedTokenLossReduction.reduce is ahead.reduced_loss

    def older_norm(grads_for_norm, norm_type=2, model_parallel_group=None):
        """Megatron 0.11's."""

    def older_clip(parameters, max_norm, total_norm):
        """Megatron 0.8's."""

    monkeypatch.setattr(ahead, "Buckets", None)
    for norm, clip in ((older_norm, ahead.STOCK_CLIP), (ahead.STOCK_NORM, older_clip)):
        optimizer.get_grad_norm_fp32, optimizer.clip_grad_by_total_norm_fp32 = norm, clip
        ahead.RunAhead().setup(trainer, module, "fit")
        assert optimizer.get_grad_norm_fp32 is norm
        assert (optimizer.clip_grad_by_total_norm_fp32 is ahead.clip) == (norm is older_norm)


@pytest.mark.parametrize("end", ["on_validation_start", "on_train_end", "on_exception", None])
def test_logs_are_written_a_step_later(ahead, end):
    """With their own step and epoch; at once outside of training; nothing is lost at an end, but after a fault."""
    import torch

    written, at_once = [], []
    logger = SimpleNamespace(log_metrics=lambda metrics, step: written.append((step, metrics)), save=lambda: None)
    connector = SimpleNamespace(_logged_metrics={}, log_metrics=lambda *args: at_once.append(args))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(_batches_that_stepped=0))
    trainer, module = ranks(2, _logger_connector=connector, loggers=[logger], training=True, fit_loop=loop)
    trainer.current_epoch = 0
    callback = ahead.RunAhead()
    callback.setup(trainer, module, "fit")
    for step in (4, 5):
        loop.epoch_loop._batches_that_stepped = step
        connector.log_metrics({"loss": torch.tensor(float(step)), "tokens": torch.tensor(8)})
    assert written == [(4, {"loss": 4.0, "tokens": 8, "epoch": 0})] and connector._logged_metrics["loss"] == 5
    if end == "on_exception":
        callback.on_exception(trainer, None, RuntimeError("the GPU may never answer"))
        assert len(written) == 1
        callback.on_exception(trainer, None, SystemExit(1))
    elif end:
        getattr(callback, end)(trainer, None)
    else:
        trainer.training = False
        connector.log_metrics({"val_loss": 1.0}, None)
        assert at_once == [({"val_loss": 1.0}, None)]
    assert written[1:] == [(5, {"loss": 5.0, "tokens": 8, "epoch": 0})]
    trainer.training, trainer.loggers = True, []
    connector.log_metrics({"loss": torch.tensor(6.0)})
    assert callback.waiting is None
