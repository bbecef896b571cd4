"""What we change in a NeMo recipe. Each function takes the recipe and the flags, and assigns; NeMo keeps the rest."""

import importlib
from pathlib import Path

import fiddle as fdl
import nemo_run as run
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from nemo import lightning as nl
from nemo.collections import llm
from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
from nemo.lightning import io

from nemo_tutorial import (
    adam,
    callbacks,
    compat,
    config,
    conversion,
    cpu,
    faults,
    hooks,
    loggers,
    lora,
    memory,
    metrics,
    models,
    network_check,
    optimizer_state,
    overrides,
    performance,
    progress,
    resume,
    samples,
    terminal,
    throughput,
)

# The fields of a NeMo config that say what the model is; all others say how it runs, and stay the recipe's.
ARCHITECTURE = (
    "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels vocab_size "
    "make_vocab_size_divisible_by share_embeddings_and_output_weights init_method_std layernorm_epsilon rotary_base "
    "rotary_percent scale_factor low_freq_factor high_freq_factor old_context_len seq_len_interpolation_factor "
    "window_size cp_comm_type query_pre_attn_scalar attn_logit_softcapping final_logit_softcapping num_moe_experts "
    "moe_ffn_hidden_size moe_router_topk moe_router_pre_softmax"
).split()


def start(family_recipe, kind, args):
    """NeMo's recipe `kind` ("pretrain_recipe" or "finetune_recipe") of the given name, on the accelerator asked for."""
    factory = getattr(getattr(llm, family_recipe), kind)
    options = {"peft_scheme": args.peft or "none"} if kind == "finetune_recipe" else {}
    recipe = factory(
        dir="results", name=args.experiment, num_nodes=args.num_nodes, num_gpus_per_node=args.num_gpus, **options
    )
    if args.accelerator == "cpu":
        fdl.update_callable(recipe, {"pretrain_recipe": cpu.pretrain, "finetune_recipe": cpu.finetune}[kind])
        recipe.trainer.accelerator = "cpu"
        # Async saving starts processes that import everything once more: half a minute a checkpoint, for nothing.
        recipe.trainer.strategy.ckpt_async_save = False
    return recipe


def set_model(recipe, args, config, tokenizer_folder):
    """The model that `config` (a NeMo config, or a Fiddle config of one) describes, with a tokenizer."""
    cls = fdl.get_callable(config) if isinstance(config, fdl.Buildable) else type(config)
    # None, too, is said: a Mistral without a window would get its config class's.
    fields = {name: getattr(config, name) for name in ARCHITECTURE if hasattr(config, name)}
    model_cls = fdl.get_callable(recipe.model)
    tokenizer = run.Config(AutoTokenizer, str(Path(tokenizer_folder).absolute()), use_fast=True)
    if models.tokenizer_code(tokenizer_folder):
        tokenizer.trust_remote_code = True
    recipe.model = run.Config(model_cls, config=run.Config(cls, **fields), tokenizer=tokenizer)
    recipe.model.config.seq_length = args.seq_length


def checkpoint_config(path):
    """The model config of a NeMo checkpoint, as a Fiddle config: nothing is built, no weights are read."""
    return io.load_context(Path(path) / "context", subpath="model.config", build=False)


def hf_config(folder):
    """The NeMo config of a Hugging Face folder's model, as an import would have it."""
    return conversion.importer(folder, models.from_hf(folder)).config


def set_parallelism(recipe, args):
    """TP, PP, CP and sequence parallelism."""
    strategy = recipe.trainer.strategy
    strategy.tensor_model_parallel_size = args.tensor_model_parallel_size
    strategy.pipeline_model_parallel_size = args.pipeline_model_parallel_size
    strategy.context_parallel_size = args.context_parallel_size
    strategy.expert_model_parallel_size = args.expert_model_parallel_size
    # Experts that are spread over GPUs are not split as well, as in NeMo's recipes; else they are split by TP.
    strategy.expert_tensor_parallel_size = args.expert_tensor_parallel_size or (
        1 if args.expert_model_parallel_size > 1 else None
    )
    strategy.sequence_parallel = args.sequence_parallel
    if args.peft and args.sequence_parallel:
        _add_callbacks(recipe, run.Config(lora.GradientsOfInputs))
    # The big models' recipes set these for their own PP; with another they stop the ranks.
    strategy.virtual_pipeline_model_parallel_size = args.virtual_pipeline_model_parallel_size
    # Megatron's own command line asks for these with parts of a stage; NeMo does not, and with PP 2 and without them
    # two GPUs take one another's gradients for hidden values: no error, only a loss that does not fall.
    parts = bool(args.virtual_pipeline_model_parallel_size)
    recipe.model.config.overlap_p2p_comm, recipe.model.config.batch_p2p_comm = parts, not parts
    # gloo may still be sending what would be freed here; NCCL's sends are in the GPU's order.
    recipe.model.config.deallocate_pipeline_outputs = args.accelerator == "gpu"
    for name in ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"):
        if getattr(strategy, name, None):
            setattr(strategy, name, False)
    # NeMo stops with "pipeline_dtype must be set" with PP > 1, and warns about a set one without.
    dtype = torch.float32 if args.precision == "fp32" else torch.bfloat16
    strategy.pipeline_dtype = dtype if args.pipeline_model_parallel_size > 1 else None
    if args.context_parallel_size > 1:
        # A rank whose part of a sample is all prompt has no loss: averaging per rank gives NaN.
        _average_over_tokens(recipe)


def _add_callbacks(recipe, *callbacks):
    """Beside those that NeMo's recipe has."""
    recipe.trainer.callbacks = [*(recipe.trainer.callbacks or []), *callbacks]


def _average_over_tokens(recipe):
    recipe.model.config.calculate_per_token_loss = True
    if isinstance(recipe.trainer.strategy.ddp, fdl.Buildable):  # a finetune recipe only names it, and it is off there
        recipe.trainer.strategy.ddp.average_in_collective = False


def set_token_loss(recipe):
    """Average the loss over the tokens of a step that have any, not over micro batches first.

    Else a token's weight would depend on how many have loss in its micro batch: on packing and --micro_batch_size.
    """
    if compat.counts_tokens():
        _average_over_tokens(recipe)


def set_precision(recipe, args):
    """bf16 (the recipe's), FP8, or fp32."""
    if args.fp8:
        recipe.trainer.plugins = compat.fp8_plugin(args.fp8_recipe or "delayed_scaling")
    elif args.precision == "fp32":
        recipe.trainer.plugins = run.Config(
            nl.MegatronMixedPrecision,
            precision="32",
            params_dtype=torch.float32,
            pipeline_dtype=torch.float32,
            autocast_enabled=False,
            grad_reduce_in_fp32=True,
        )
        recipe.optim.config.bf16 = False


def set_training(recipe, args):
    """Steps, learning rate, validation."""
    trainer, optim = recipe.trainer, recipe.optim
    trainer.max_steps = args.max_steps
    trainer.val_check_interval = args.val_check_interval
    trainer.limit_val_batches = args.limit_val_batches
    trainer.limit_test_batches = 0  # nothing is tested here; NeMo would build a test set all the same
    optim.config.lr = args.lr
    # The recipe's own is for a million steps: never out of warm-up, or an error as min_lr is above lr.
    optim.lr_scheduler = _scheduler(args)
    record = Path("results", args.experiment, "record").absolute()
    own = [run.Config(hooks.Seed, args.seed)]
    if args.exit_interval:
        own.append(run.Config(callbacks.ExitInterval, args.exit_interval))
    if args.early_stopping_patience:
        own.append(run.Config(hooks.EarlyStop, args.early_stopping_patience, str(record / faults.EARLY_STOP)))
    if args.save_interval and args.save_interval != args.val_check_interval:
        own.append(run.Config(hooks.SaveInterval, args.save_interval))
    if args.recompute == "full" and args.peft:
        own.append(run.Config(hooks.InputGradients))
    if args.check_network:
        own.append(run.Config(network_check.NetworkCheck))
    if args.keep_optimizer == "last":  # before the heartbeat, which waits longer for saves
        own.append(run.Config(callbacks.KeepLastOptimizer, str(record.parent)))
    own += [
        run.Config(callbacks.OwnSchedule),
        run.Config(callbacks.OneEpoch),
        run.Config(callbacks.RandomState, args.seed),
        run.Config(callbacks.Heartbeat, str(record), args.hang_timeout),
        run.Config(callbacks.LossGuard, str(record), args.max_loss_spike),
        run.Config(callbacks.Preemption, str(record / faults.PREEMPTED)),
    ]
    _add_callbacks(recipe, *own)


def _scheduler(args):
    """NeMo's scheduler for --lr_decay; schedule.learning_rate computes the same."""
    from nemo.lightning.pytorch import optim

    if args.lr_decay == "cosine":
        names = {"warmup_steps": args.warmup_steps, "constant_steps": 0, "min_lr": args.min_lr}
        return run.Config(optim.CosineAnnealingScheduler, **names)
    if args.lr_decay == "constant":
        return run.Config(optim.WarmupPolicyScheduler, warmup_steps=args.warmup_steps, min_lr=args.min_lr)
    # This one takes shares of the run, and cuts them off to whole steps.
    hold = args.max_steps - args.warmup_steps - args.lr_wsd_decay_steps if args.lr_decay == "wsd" else 0
    shares = {
        "warmup_ratio": (args.warmup_steps + 0.5) / args.max_steps,
        "hold_ratio": (hold + 0.5) / args.max_steps,
    }
    cls = compat.scheduler("WarmupHoldAnnealScheduler", f"--lr_decay {args.lr_decay}")
    return run.Config(cls, min_lr=args.min_lr, decay_schedule="linear", **shares)


def set_memory(recipe, args, model):
    """What is recomputed, and the precisions of the optimizer."""
    config, optim = recipe.model.config, recipe.optim.config
    # The big models' recipes recompute by themselves; here the flags say it.
    for name in ("granularity", "method", "num_layers", "modules"):
        if getattr(config, f"recompute_{name}", None) is not None:
            setattr(config, f"recompute_{name}", None)
    if args.recompute != "none":
        config.recompute_granularity = args.recompute
    if args.recompute == "full":
        config.recompute_method = args.recompute_method or "uniform"
        config.recompute_num_layers = args.recompute_num_layers or 1
    elif args.recompute == "selective":
        modules = list(memory.recomputed_modules(args, model))
        if not compat.supported(fdl.get_callable(config), recompute_modules=modules):
            raise ValueError(
                "--recompute selective: this NeMo can't choose the modules; use full, or a newer container"
            )
        config.recompute_modules = modules
    if not args.use_precision_aware_optimizer:
        return
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.uint8}
    optim.use_precision_aware_optimizer = True
    _add_callbacks(recipe, run.Config(adam.SmallStates))
    for name in ("main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype", "main_grads_dtype"):
        setattr(optim, name, dtypes[getattr(args, name) or "fp32"])
    if args.main_grads_dtype == "bf16":  # the buffers that the gradients are summed up in
        recipe.trainer.plugins.grad_reduce_in_fp32 = False
        ddp = ddp_config(recipe)
        ddp.grad_reduce_in_fp32 = False
        if not args.peft:
            # In buckets: as one, 8B parameters' gradients in bf16 were NaN in the first step; why is not known.
            ddp.overlap_grad_reduce = ddp.overlap_param_gather = True


def ddp_config(recipe):
    """The recipe's config of Megatron's data parallelism; a finetune recipe has a word there, until now."""
    strategy = recipe.trainer.strategy
    if not isinstance(strategy.ddp, fdl.Buildable):  # what NeMo makes of the word
        strategy.ddp = run.Config(DistributedDataParallelConfig, check_for_nan_in_grad=True)
    return strategy.ddp


def set_adapter(recipe, args, model):
    """The shape of the adapter, of --peft."""
    if not args.peft:
        return
    recipe.peft.target_modules = list(memory.adapter_targets(args, model))
    if args.lora_rank:
        recipe.peft.dim = args.lora_rank
    recipe.peft.alpha = args.lora_alpha or 2 * recipe.peft.dim
    if args.lora_dropout is not None:
        recipe.peft.dropout = args.lora_dropout


def set_performance(recipe, args, settings=None):
    """`settings`, or those of performance.SETTINGS that the flags call for; what this NeMo lacks is left out."""
    if settings is None:
        settings = performance.settings(args)
    for setting in settings:
        for path, value in setting.values.items():
            *parents, name = path.split(".")
            node = recipe
            for parent in parents:
                node = getattr(node, parent, None)
            if isinstance(node, fdl.Buildable) and compat.supported(fdl.get_callable(node), **{name: value}):
                setattr(node, name, value)
        if setting.callback:
            module, cls = setting.callback.split(".")
            callback = getattr(importlib.import_module(f"nemo_tutorial.{module}"), cls)
            _add_callbacks(recipe, run.Config(callback))


def set_checkpointing(recipe, args, restore_from):
    """A checkpoint after each validation, the best kept; where the weights come from.

    A run that has a checkpoint goes on from it: weights, optimizer, step, data order. Else `restore_from`, if it is
    not None, gives the weights.
    """
    # Else a checkpoint's optimizer can be loaded only on the layout that wrote it (NeMo 2.6 and newer).
    for name, value in compat.supported(nl.MegatronStrategy, ckpt_optim_fully_reshardable=True).items():
        setattr(recipe.trainer.strategy, name, value)
    _add_callbacks(recipe, run.Config(optimizer_state.SharedByReplicas), run.Config(adam.StatesOnce))
    log = recipe.log
    log.log_dir = str(Path("results").absolute())
    log.name = args.experiment
    log.use_datetime_version = False
    log.tensorboard.save_dir = f"{args.experiment}/tensorboard"  # NeMo puts log_dir before it
    log.tensorboard.name = ""
    # After each validation, so that the name's val_loss is real: saved at other times it would say 0.00, and
    # NeMo takes that for the best and deletes the others. "link": the last one is not written twice.
    log.ckpt = run.Config(
        nl.ModelCheckpoint,
        monitor="val_loss",
        mode="min",
        save_last="link",
        save_top_k=args.save_top_k,
        save_optim_on_train_end=True,  # else the run can't go on from its last checkpoint
        filename="{model_name}--{val_loss:.2f}-{step}-{consumed_samples}",
    )
    recipe.resume = run.Config(
        resume.NewestComplete,
        run=str(Path("results", args.experiment).absolute()),
        restore_config=run.Config(nl.RestoreConfig, path=str(Path(restore_from).absolute())) if restore_from else None,
        resume_if_exists=True,
    )


def set_logging(recipe, args, model):
    """The progress line and files, what the model says to --generate_prompts, and the loggers."""
    trainer, record = recipe.trainer, Path("results", args.experiment, "record").absolute()
    trainer.enable_progress_bar = False  # NeMo would print a line of its own each step
    trainer.log_every_n_steps = args.log_interval
    own = [
        run.Config(
            progress.Progress,
            str(metrics.path(record.parent)),
            args.log_interval,
            throughput.cost(model, args.peft),
            args.precision != "fp32",
        )
    ]
    if args.generate_prompts:
        own.append(run.Config(samples.Samples, str(record), args.generate_tokens))
    _add_callbacks(recipe, *own)
    if args.wandb:
        recipe.log.wandb = run.Config(
            loggers.WeightsAndBiases,
            project=args.wandb_project or args.experiment,
            name=args.wandb_name or args.experiment,
            save_dir=args.experiment,  # NeMo puts log_dir before it
        )
    if args.mlflow is not None:
        recipe.log.extra_loggers = [
            run.Config(
                loggers.MLflow,
                experiment_name=args.experiment,
                run_name=args.experiment,
                tracking_uri=args.mlflow or None,
                save_dir=str(record.parent / "mlruns"),
            )
        ]


def resolved(recipe, args):
    """The recipe that is run: `recipe`, or --config FILE's whole one, with the changes at the end of the command.

    Where weights come from is decided anew at each start. Raises ValueError for changes that can't be made.
    """
    if args.recipe is not None:
        given = config.load(args.recipe)
        given.resume = recipe.resume
        if given.data.tokenizer == given.model.tokenizer:  # one object: NeMo-Run's YAML writes it twice
            given.data.tokenizer = given.model.tokenizer
        found = config.differences(as_text(recipe), as_text(given))
        rows = [(path, f"{theirs!r}, by the flags {ours!r}") for path, (ours, theirs) in found.items()]
        terminal.describe(f"recipe of {args.config}", rows or [("as the flags make it", "")])
        recipe = given
    overrides.apply(recipe, args.overrides)
    return recipe


def as_text(recipe):
    """The recipe as YAML, as NeMo-Run writes it; config.load reads it."""
    from nemo_run.core.serialization.yaml import YamlSerializer

    return YamlSerializer().serialize(recipe)
