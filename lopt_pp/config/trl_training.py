"""What becomes of the flags of `trl sft` on training and its processes. `trl_flags.py` joins the sections."""

from lopt_pp.config.foreign_rules import (
    MISSING,
    NO_EFFECT,
    SAME,
    Row,
    by_value,
    checkpointing_kwargs,
    ignored,
    one_of,
    renamed,
    share_of_steps,
    unless,
    word_of,
)

TRAINING: dict[str, list[Row]] = {
    "Training": [
        Row(
            "per_device_train_batch_size gradient_accumulation_steps",
            SAME,
            "a step has as many rows as their product, times the replicas (`--data_parallel`), not times the processes",
        ),
        Row("num_train_epochs max_steps seed", SAME),
        Row(
            "learning_rate",
            SAME,
            "of the last stage; the earlier ones learn at `--local_learning_rate`, a tenth by default "
            "([why](tuning.md))",
        ),
        Row(
            "lr_scheduler_type weight_decay adam_beta1 adam_beta2 adam_epsilon",
            SAME,
            "schedules that follow a metric are refused",
        ),
        Row(
            "warmup_steps",
            SAME,
            "a number below 1 is a share of all steps: `--warmup_ratio`",
            share_of_steps("warmup_ratio"),
        ),
        Row(
            "lr_scheduler_kwargs",
            SAME,
            "rates among them are of `--learning_rate`; a stage that learns at another rate keeps the same share of it",
        ),
        Row(
            "optim",
            SAME,
            "`adamw_torch_fused` (the default of both), `adafactor`, `sgd`, bitsandbytes' and schedule-free ones, and "
            "PyTorch's `muon`: see [Optimizers](tuning.md#optimizers)",
        ),
        Row("optim_args", SAME, "TRL passes them over where the optimizer is AdamW"),
        Row("optim_target_modules", MISSING, "GaLore and APOLLO, which read it, are not among `--optim`", unless()),
        Row("max_grad_norm", SAME, "of each stage's own gradient"),
        Row(
            "average_tokens_across_devices",
            MISSING,
            "always so: a loss is the mean over all counted tokens of the step",
            by_value({"true": {}}),
        ),
        Row("gradient_checkpointing", SAME, "TRL checkpoints by default"),
        Row("activation_checkpointing", "gradient_checkpointing", "", renamed("gradient_checkpointing")),
        Row(
            "gradient_checkpointing_kwargs activation_checkpointing_kwargs",
            MISSING,
            "`use_reentrant` changes no result and is passed over; there are no other settings",
            checkpointing_kwargs,
        ),
        Row("activation_offloading", SAME, "`--optimizer_offload` does it for the optimizer's state"),
        Row("torch_compile", SAME, "layer by layer"),
        Row("torch_compile_backend torch_compile_mode", SAME, "either switches `--torch_compile` on"),
        Row(
            "loss_type",
            SAME,
            "`nll` and `dft`; `chunked_nll` is `nll`, which never holds all logits. Held-out losses are cross-entropy",
            lambda name, value: {} if word_of(value) in ("none", "null", "chunked_nll") else {name: value},
        ),
        Row("label_smoothing_factor", SAME, "in training; held-out losses are without"),
        Row("neftune_noise_alpha", SAME, "where the first stage learns"),
        Row(
            "use_liger_kernel liger_kernel_config",
            NO_EFFECT,
            "the logits are never held all at once where the output head is a plain linear map",
            ignored,
        ),
        Row("torch_empty_cache_steps", NO_EFFECT, "memory is PyTorch's to manage", ignored),
        Row("auto_find_batch_size", MISSING, "`lopt-pp plan` says what fits", unless()),
        Row("full_determinism", SAME, "without `CUDA_LAUNCH_BLOCKING`, which PyTorch does not need for it"),
        Row("data_seed", SAME),
    ],
    "Processes": [
        Row("use_cpu", "backend", "`gloo` computes on CPUs", one_of({"true": {"backend": "gloo"}, "false": {}})),
        Row(
            "ddp_backend",
            "backend",
            "`nccl`; with `gloo`, a run here computes on CPUs: `--backend gloo` says so",
            by_value({"nccl": {"backend": "nccl"}}),
        ),
        Row("ddp_timeout", "stream_timeout", "how long a stage waits for its neighbour", renamed("stream_timeout")),
        Row(
            "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ignore_bias_buffers "
            "local_rank",
            NO_EFFECT,
            "replicas and ranks are set up by themselves",
            ignored,
        ),
        Row("fsdp fsdp_config deepspeed", MISSING, "`--sharding full` shares a stage out (FSDP2)", unless()),
        Row(
            "parallelism_config",
            MISSING,
            "`--num_stages`, `--pipeline_processes` and `--data_parallel`: see [Layouts](layouts.md)",
            unless(),
        ),
        Row("accelerator_config", MISSING, "there is no Accelerate in it", unless()),
        Row("debug", MISSING, "a loss or gradient that is not finite ends the run with its step and stage", unless()),
        Row("skip_memory_metrics", NO_EFFECT, "metrics have the peak memory of each stage", ignored),
    ],
}
