"""What becomes of each flag of `trl sft` here, those of transformers' `TrainingArguments` among them.

One table, without an import of either. Command lines and YAML files go by it (`foreign.py`), docs/trl.md shows it, and
a test holds it against the fields of the installed versions.
"""

from lopt_pp.config.foreign_rules import (
    MISSING,
    NO_EFFECT,
    SAME,
    Row,
    by_value,
    checkpointing_kwargs,
    dtype,
    ignored,
    max_length,
    renamed,
    resume,
    share_of_steps,
    trackers,
    unless,
    word_of,
)

TABLE: dict[str, list[Row]] = {
    "Model": [
        Row("model_name_or_path model_revision attn_implementation trust_remote_code", SAME),
        Row(
            "dtype",
            SAME,
            "there the dtype of the weights as loaded; here that of the computation. Weights are float32 unless it is "
            "`pure_bfloat16`; `--save_dtype` says in what the result is saved",
            dtype,
        ),
        Row(
            "bf16",
            "dtype",
            "`bfloat16`: weights, gradients and optimizer state in float32, as with `--bf16`; without it `float32`",
            by_value({"true": {"dtype": "bfloat16"}, "false": {"dtype": "float32"}}),
        ),
        Row("fp16", MISSING, "float16 would need its loss scaled; take `--dtype bfloat16`", unless()),
        Row("tf32", MISSING, "not switched by a flag; take `--dtype bfloat16` for speed", unless()),
        Row("model_init_kwargs", MISSING, "the model is as its config says", unless()),
        Row("use_cache", NO_EFFECT, "training has no cache of keys and values", ignored),
        Row("router_aux_loss_coef", MISSING, "the loss is that of the tokens alone", unless()),
        Row(
            "use_peft lora_r lora_alpha lora_dropout lora_target_modules lora_target_parameters lora_modules_to_save "
            "lora_task_type use_rslora use_dora",
            MISSING,
            "all weights of a stage are trained; adapters are not supported",
            unless("16", "32", "0.05", "causal_lm"),
        ),
        Row(
            "load_in_8bit load_in_4bit bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage",
            MISSING,
            "weights are trained as they are, in float32 or bfloat16: `--dtype`",
            unless("nf4"),
        ),
    ],
    "Data": [
        Row("dataset_name dataset_config", SAME, "or `--train_file`"),
        Row("dataset_train_split", "dataset_split", "", renamed("dataset_split")),
        Row("dataset_test_split", SAME, "or `--eval_file`"),
        Row("test_split_size", "eval_split_size", "", renamed("eval_split_size")),
        Row(
            "dataset_streaming",
            "streaming",
            "rows are tokenized when their step comes; the order is the same",
            renamed("streaming"),
        ),
        Row("streaming", SAME),
        Row("datasets", MISSING, "`--train_file` takes several files", unless()),
        Row("max_length", SAME, "longer rows are left out and counted, not cut", max_length),
        Row("truncation_mode", MISSING, "rows are never cut", unless("keep_start")),
        Row(
            "shuffle_dataset",
            SAME,
            "true by default. `false` keeps the file's order in each epoch, as TRL does with "
            "`--train_sampling_strategy sequential`",
        ),
        Row(
            "train_sampling_strategy",
            SAME,
            "`batch_rebalance` by default, which changes no step; `sequential` is `--shuffle_dataset false`",
            lambda name, value: {"shuffle_dataset": False} if word_of(value) == "sequential" else {name: value},
        ),
        Row(
            "completion_only_loss",
            SAME,
            "true by default, for every row with a prompt and an answer",
            lambda name, value: {} if word_of(value) in ("none", "null") else {name: value},
        ),
        Row(
            "assistant_only_loss",
            SAME,
            "true by default, also without generation marks; answers need a stop token, or `--allow_no_stop_token`",
        ),
        Row("packing", SAME, "by `bfd`, and no row is cut. Attention never crosses from row to row, with any kernel"),
        Row("packing_strategy", MISSING, "rows are packed by `bfd`, and never cut", unless("bfd")),
        Row("eval_packing", NO_EFFECT, "held-out rows are not packed, which changes no loss", ignored),
        Row("padding_free", SAME, "meant for flash attention here, too"),
        Row("dataset_text_field chat_template_path dataset_num_proc", SAME),
        Row("pad_to_multiple_of", NO_EFFECT, "padding changes no loss", ignored),
        Row("length_column_name", NO_EFFECT, "lengths are those of the tokenized rows", ignored),
        Row("dataset_kwargs", MISSING, "tokenized rows are known by their columns: see [Data](data.md)", unless()),
        Row("eos_token pad_token", MISSING, "set them in the tokenizer, and save it with the model", unless()),
        Row("dataloader_drop_last", MISSING, "what is left at the end of an epoch makes a smaller step", unless()),
        Row(
            "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
            "dataloader_multiprocessing_context dataloader_in_order",
            NO_EFFECT,
            "tokens are cached on disk before training",
            ignored,
        ),
        Row("remove_unused_columns", NO_EFFECT, "columns that are not used are left out", ignored),
        Row("label_names", MISSING, "labels are made of the rows, or are their column `labels`", unless()),
        Row("ignore_data_skip", MISSING, "a run that goes on goes on with the next rows", unless()),
    ],
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
            "schedules that follow a metric or need settings of their own are refused",
        ),
        Row(
            "warmup_steps",
            SAME,
            "a number below 1 is a share of all steps: `--warmup_ratio`",
            share_of_steps("warmup_ratio"),
        ),
        Row("lr_scheduler_kwargs", MISSING, "schedules have the settings that they have by default", unless()),
        Row("optim", SAME, "`adamw_torch_fused` (the default of both) and `adamw_torch`"),
        Row("optim_args optim_target_modules", MISSING, "`--optim` is AdamW, of all weights of a stage", unless()),
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
        Row("activation_offloading", MISSING, "`--gradient_checkpointing` and more stages take less memory", unless()),
        Row("torch_compile", SAME, "layer by layer"),
        Row("torch_compile_backend torch_compile_mode", MISSING, "`--torch_compile` has no settings", unless()),
        Row(
            "loss_type label_smoothing_factor neftune_noise_alpha", MISSING, "the loss is cross-entropy", unless("nll")
        ),
        Row(
            "use_liger_kernel liger_kernel_config",
            NO_EFFECT,
            "the logits are never held all at once where the output head is a plain linear map",
            ignored,
        ),
        Row("torch_empty_cache_steps", NO_EFFECT, "memory is PyTorch's to manage", ignored),
        Row("auto_find_batch_size", MISSING, "`lopt-pp plan` says what fits", unless()),
        Row("full_determinism", SAME, "without `CUDA_LAUNCH_BLOCKING`, which PyTorch does not need for it"),
        Row("data_seed", MISSING, "`--seed` is that of the rows, too", unless()),
    ],
    "Processes": [
        Row("use_cpu", "backend", "`gloo` computes on CPUs", by_value({"true": {"backend": "gloo"}, "false": {}})),
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
    "Checkpoints, logs, the hub": [
        Row(
            "output_dir save_total_limit",
            SAME,
            "a directory with a model or another run's checkpoints is refused; see `--overwrite_output_dir`",
        ),
        Row("save_steps", SAME, "a whole number, 500 by default; the last step is saved as well", share_of_steps("")),
        Row(
            "save_strategy",
            "save_steps",
            "checkpoints are counted in steps: `steps` is that, `no` is `--save_steps 0`; for `best` see "
            "`--load_best_model_at_end`",
            by_value({"steps": {}, "no": {"save_steps": 0}}),
        ),
        Row("resume_from_checkpoint", SAME, "a directory, or `latest`", resume),
        Row(
            "enable_jit_checkpoint",
            NO_EFFECT,
            "always so: SIGTERM, SIGINT and SIGUSR1 save a [checkpoint](checkpoints.md#stopping)",
            ignored,
        ),
        Row("save_only_model", MISSING, "`lopt-pp export` makes the model of a checkpoint", unless()),
        Row("save_on_each_node", MISSING, "`--output_dir` is shared by all machines", unless()),
        Row("restore_callback_states_from_checkpoint", NO_EFFECT, "there are no callbacks", ignored),
        Row("logging_steps", SAME, "of the log lines; [metrics.jsonl](metrics.md) has every step", share_of_steps("")),
        Row("logging_strategy", MISSING, "log lines are counted in steps: `--logging_steps`", by_value({"steps": {}})),
        Row(
            "logging_first_step log_on_each_node include_num_input_tokens_seen log_level log_level_replica "
            "disable_tqdm",
            NO_EFFECT,
            "[metrics.jsonl](metrics.md) has every step, with its tokens; there are no bars",
            ignored,
        ),
        Row("logging_nan_inf_filter", NO_EFFECT, "a loss that is not finite ends the run", ignored),
        Row(
            "report_to",
            SAME,
            "`tensorboard` or `wandb`; nothing by default. `lopt-pp report` makes a [page](insight.md) of any run",
            trackers,
        ),
        Row("run_name", SAME),
        Row(
            "project trackio_space_id trackio_bucket_id trackio_static_space_id",
            MISSING,
            "trackers read their own environment variables, such as `WANDB_PROJECT`",
            unless("huggingface"),
        ),
        Row("push_to_hub", MISSING, "upload `--output_dir` yourself", unless()),
        Row(
            "hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision",
            NO_EFFECT,
            "only `--push_to_hub` would read them",
            ignored,
        ),
    ],
    "Evaluation": [
        Row(
            "eval_steps",
            SAME,
            "500 by default; where there are rows to evaluate on: see [Evaluation](evaluation.md)",
            share_of_steps(""),
        ),
        Row("per_device_eval_batch_size", SAME, "where there are rows to evaluate on"),
        Row(
            "eval_strategy",
            "eval_steps",
            "evaluations are counted in steps: `steps` is that, together with `--eval_steps`; `no` is to give no "
            "held-out rows. For the last step alone: `--eval_steps 0`",
            by_value({"steps": {}, "no": {}}),
        ),
        Row("eval_on_start", SAME, "as step 0"),
        Row("load_best_model_at_end", SAME, "by the lowest `eval_loss`"),
        Row(
            "metric_for_best_model greater_is_better",
            MISSING,
            "the best model is that with the lowest `eval_loss`",
            unless("loss", "eval_loss"),
        ),
        Row("eval_delay", MISSING, "evaluations begin with the first `--eval_steps`", unless()),
        Row(
            "prediction_loss_only eval_accumulation_steps eval_do_concat_batches eval_use_gather_object "
            "batch_eval_metrics",
            NO_EFFECT,
            "loss and perplexity are measured, and no logits are kept",
            ignored,
        ),
        Row("include_for_metrics", MISSING, "loss and perplexity are measured, and nothing else", unless()),
        Row("bf16_full_eval fp16_full_eval", MISSING, "an evaluation computes in `--dtype`", unless()),
        Row(
            "do_train do_eval do_predict", NO_EFFECT, "a run trains, and evaluates where it has held-out rows", ignored
        ),
    ],
}
"""By the sections of docs/trl.md."""
