"""The optimizer's state in checkpoints: of any number of replicas, whole, and the same for Megatron."""

from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.nemo


def test_owners_have_about_as_many_elements():
    """Of three ranks, by turns; what is this rank's own is what Megatron says it is."""
    from nemo_tutorial import optimizer_state

    class Parameter:
        def __init__(self, size):
            self.numel = lambda: size

    a, b, c, d, e = map(Parameter, (70, 16, 10, 50, 30))
    ranges = [{"bf16": [{"param_map": {b: {"param": SimpleNamespace(start=4, end=9)}}}, {"param_map": {}}]}]
    group = SimpleNamespace(size=lambda: 3)
    buffers = [SimpleNamespace(param_index_map=dict.fromkeys(names)) for names in ((a, b, c), (d, e))]
    optimizer = SimpleNamespace(buffers=buffers, gbuf_ranges=ranges, data_parallel_group=group)
    assert list(optimizer_state.parameters(optimizer)) == [
        (0, a, 0, None),
        (1, b, 1, (4, 9)),
        (2, c, 2, None),
        (3, d, 2, None),
        (4, e, 1, None),
    ]


def test_replicas_go_on(root, tmp_path, monkeypatch):
    """Three, of which Megatron's own way mixes the parameters' states up, two, and one as Megatron loads it."""
    monkeypatch.syspath_prepend(root / "benchmarks")
    import replicas

    (tmp_path / "checkpoint").mkdir()
    saved = replicas.launch("ours", 3, 200, 6, "--save", tmp_path / "checkpoint")
    assert saved["padded"]
    for count, way, off in ((3, "ours", 0), (2, "ours", 0.01), (1, "stock", 0.01)):
        loaded = replicas.launch(way, count, 200, 6, "--load", tmp_path / "checkpoint")
        assert loaded["losses"] == pytest.approx(saved["losses"], rel=off), (count, way)


def test_states_that_are_mixed_up_are_refused(root, tmp_path, monkeypatch):
    """As Megatron saves those of three replicas."""
    monkeypatch.syspath_prepend(root / "benchmarks")
    import replicas

    (tmp_path / "checkpoint").mkdir()
    replicas.launch("stock", 3, 200, 6, "--save", tmp_path / "checkpoint")
    with pytest.raises(RuntimeError, match="not those of its model.*--experiment"):
        replicas.launch("ours", 1, 200, 6, "--load", tmp_path / "checkpoint")


def test_a_checkpoints_weights_are_gone_when_its_states_are_loaded(tmp_path, monkeypatch):
    """In Lightning's order: the model has them, then callbacks are asked, then the optimizer's states come."""
    import lightning.pytorch as pl
    import torch
    from lightning.pytorch.loops import fit_loop, utilities

    from nemo_tutorial import optimizer_state

    # A strategy of NeMo's, in another test of this process, puts its own there.
    monkeypatch.setattr(fit_loop, "_select_data_fetcher", utilities._select_data_fetcher)

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer, self.found = torch.nn.Linear(2, 1), []

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.layer.parameters(), lr=0.1)
            load = optimizer.load_state_dict
            optimizer.load_state_dict = lambda state: (self.look(), load(state))
            return optimizer

        def look(self):
            loaded = self.trainer._checkpoint_connector._loaded_checkpoint
            self.found.append(("state_dict" in loaded, self.layer.weight.detach().clone()))

        def training_step(self, batch, index):
            return self.layer(batch).square().mean()

    def fit(steps, **where):
        module, callback = Module(), optimizer_state.SharedByReplicas()
        callback.setup = lambda trainer, pl_module, stage: None  # which is for Megatron's
        options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = pl.Trainer(max_steps=steps, callbacks=[callback], default_root_dir=tmp_path, **options)
        trainer.fit(module, torch.utils.data.DataLoader(torch.ones(8, 2), batch_size=1), **where)
        return trainer, module

    trainer, first = fit(2)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    _, second = fit(4, ckpt_path=tmp_path / "first.ckpt")
    [(there, weight)] = second.found
    assert not there and weight.equal(first.layer.weight) and not second.layer.weight.equal(weight)
