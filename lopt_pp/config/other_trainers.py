"""Flags of earlier versions of TRL and transformers, and hints for those that other trainers call otherwise."""

from lopt_pp.config.foreign_rules import MISSING, NO_EFFECT, Row, dtype, ignored, max_length, one_of, renamed, unless

OLDER: list[Row] = [
    Row("max_seq_length", "max_length", "", lambda name, value: max_length("max_length", value)),
    Row("torch_dtype", "dtype", "see `--dtype`", lambda name, value: dtype("dtype", value)),
    Row(
        "evaluation_strategy",
        "eval_strategy",
        "see `--eval_strategy`",
        one_of({"no": {}, "steps": {}, "epoch": {"eval_strategy": "epoch"}}),
    ),
    Row(
        "group_by_length",
        "train_sampling_strategy",
        "",
        one_of({"true": {"train_sampling_strategy": "group_by_length"}, "false": {}}),
    ),
    Row("no_cuda", "backend", "`gloo` computes on CPUs", one_of({"true": {"backend": "gloo"}, "false": {}})),
    Row("per_gpu_train_batch_size", "per_device_train_batch_size", "", renamed("per_device_train_batch_size")),
    Row("per_gpu_eval_batch_size", "per_device_eval_batch_size", "", renamed("per_device_eval_batch_size")),
    Row("use_liger", NO_EFFECT, "see `--use_liger_kernel`", ignored),
    Row(
        "save_safetensors dispatch_batches split_batches include_tokens_per_second dataset_batch_size "
        "num_of_sequences chars_per_token use_legacy_prediction_loop half_precision_backend fp16_backend "
        "fp16_opt_level jit_mode_eval use_ipex ray_scope torchdynamo past_index",
        NO_EFFECT,
        "nothing here depends on them",
        ignored,
    ),
    Row("adafactor", "optim", "", one_of({"true": {"optim": "adafactor"}, "false": {}})),
    Row("use_mps_device", MISSING, "a run computes on CUDA or on CPUs", unless()),
]
"""Flags that earlier versions of TRL and transformers had."""

_CALLED: dict[str, str] = {
    "model_name_or_path": "model model_name base_model base_model_name model_path model_id model_dir pretrained_model "
    "pretrained_model_name pretrained_model_name_or_path checkpoint_path init_from",
    "train_file": "data data_path data_file data_files data_dir dataset_path dataset_dir train_data train_dataset "
    "train_path training_file training_data train_files input_file corpus jsonl",
    "dataset_name": "dataset dataset_id dataset_repo",
    "dataset_config": "dataset_config_name subset dataset_subset",
    "dataset_split": "split_name train_split",
    "dataset_text_field": "text_column text_field text_key content_field",
    "dataset_num_proc": "num_proc preprocessing_num_workers dataset_processes dataset_num_workers num_workers",
    "eval_file": "validation_file val_file valid_file eval_data eval_dataset eval_path validation_data val_data "
    "test_file test_data dev_file",
    "early_stopping_patience": "early_stopping patience early_stop early_stopping_rounds",
    "eval_split_size": "val_set_size val_size val_split validation_split validation_split_percentage test_size "
    "eval_size split_validation",
    "output_dir": "output out out_dir output_path outdir save_dir save_path save ckpt_dir checkpoint_dir output_folder "
    "default_root_dir work_dir",
    "overwrite_output_dir": "overwrite force overwrite_output",
    "learning_rate": "lr base_lr max_lr peak_lr learning_rates",
    "per_device_train_batch_size": "batch_size bs micro_batch_size micro_batch train_batch_size "
    "train_micro_batch_size_per_gpu batch_size_per_device per_device_batch_size mbs batch",
    "per_device_eval_batch_size": "eval_batch_size val_batch_size",
    "gradient_accumulation_steps": "grad_accum grad_accum_steps gradient_accumulation grad_accumulation_steps "
    "accumulate_grad_batches accumulation_steps accum_steps num_microbatches microbatches gas",
    "num_train_epochs": "epochs epoch num_epochs n_epochs max_epochs train_epochs",
    "max_steps": "steps num_steps train_steps num_train_steps total_steps max_train_steps training_steps train_iters "
    "max_iters iterations",
    "max_length": "cutoff_len cutoff_length sequence_len sequence_length seq_len seq_length max_len max_seq_len "
    "max_sequence_length block_size context_length context_len model_max_length max_tokens",
    "warmup_steps": "warmup num_warmup_steps warmup_iters lr_warmup_steps",
    "warmup_ratio": "warmup_fraction lr_warmup_ratio warmup_proportion",
    "lr_scheduler_type": "scheduler lr_scheduler lr_schedule lr_decay_style scheduler_type",
    "weight_decay": "wd",
    "adam_beta1": "beta1",
    "adam_beta2": "beta2",
    "adam_epsilon": "eps epsilon adam_eps",
    "max_grad_norm": "grad_clip clip_grad clip_grad_norm gradient_clip gradient_clipping gradient_clip_val max_norm",
    "optim": "optimizer optimizer_type",
    "dtype": "precision mixed_precision bfloat16 bf16_mixed fp32 half compute_dtype model_dtype",
    "gradient_checkpointing": "activation_checkpoint grad_checkpointing gradient_checkpoint recompute checkpointing",
    "torch_compile": "compile",
    "attn_implementation": "flash_attention flash_attention_2 use_flash_attention use_flash_attention_2 use_flash_attn "
    "flash_attn attn attention attention_implementation",
    "packing": "sample_packing pack pack_sequences",
    "streaming": "stream",
    "chat_template_path": "chat_template template prompt_template conversation_template",
    "assistant_only_loss": "train_on_responses_only roles_to_train",
    "shuffle_dataset": "shuffle",
    "train_sampling_strategy": "sampler sampling_strategy",
    "seed": "random_seed manual_seed rng_seed",
    "save_steps": "save_every save_interval save_freq checkpoint_every checkpoint_interval checkpointing_steps "
    "ckpt_interval saves_per_epoch save_every_n_steps",
    "save_total_limit": "keep_checkpoints max_checkpoints keep_last checkpoints_total_limit",
    "resume_from_checkpoint": "resume resume_from resume_path resume_checkpoint auto_resume load_checkpoint "
    "auto_resume_from_checkpoints ckpt_path",
    "eval_steps": "eval_every eval_interval eval_freq val_interval val_check_interval evals_per_epoch evaluation_steps",
    "logging_steps": "log_every log_interval logging_interval log_steps log_freq log_every_n_steps logging_freq",
    "report_to": "wandb use_wandb tracker log_with with_tracking tensorboard logger",
    "project": "wandb_project swanlab_project comet_project mlflow_experiment_name project_name",
    "run_name": "wandb_name wandb_run_name exp_name experiment_name experiment name wandb_run_id",
    "logging_dir": "log_dir tensorboard_dir",
    "num_stages": "stages pp pp_size pipeline_parallel_size pipeline_model_parallel_size pipeline_parallel "
    "pipeline_parallel_degree num_pipeline_stages pipeline_stages pp_degree",
    "data_parallel": "dp dp_size data_parallel_size data_parallel_degree dp_degree dp_replicate num_replicas replicas",
    "sharding": "zero zero_stage fsdp2 sharding_strategy dp_shard",
    "backend": "dist_backend distributed_backend",
    "split": "layer_split cuts partition",
    "local_learning_rate": "local_lr",
    "reconstruction_weight": "lambda local_weight reconstruction_lambda",
    "trust_remote_code": "remote_code",
    "model_revision": "revision",
}


_SAID: dict[str, str] = {
    "adapter lora lora_rank lora_model_dir use_lora peft finetuning_type qlora": (
        "all weights of a stage are trained; there are no adapters"
    ),
    "quantization quantization_bit quantize load_in_4_bit bits": "weights are not quantized",
    "gpus num_gpus n_gpus n_gpu devices world_size nproc_per_node num_processes": (
        "it is --nproc here, one process for each GPU; torchrun has --nproc-per-node"
    ),
    "tokenizer tokenizer_name tokenizer_name_or_path tokenizer_path special_tokens": (
        "the tokenizer is that of --model_name_or_path; save another one with the model"
    ),
    "tp tp_size tensor_parallel_size tensor_parallel tensor_model_parallel_size cp cp_size context_parallel_size "
    "sequence_parallel_size sp_size": "a stage is not split further; see --num_stages, --data_parallel and --sharding",
    "mask_prompt train_on_prompt train_on_inputs train_on_input mask_history": (
        "--completion_only_loss and --assistant_only_loss say what counts; with false the prompt counts, too"
    ),
    "max_samples max_train_samples num_samples num_train_samples max_rows": (
        "write the rows that you mean into a file, or take a slice of --dataset_name by --dataset_split train[:1000]"
    ),
    "max_eval_samples": "write the rows that you mean into a file for --eval_file",
    "no_shuffle": "it is --shuffle_dataset false here",
    "plot_loss": "lopt-pp report makes a page with the curves",
    "overwrite_cache": "what is cached goes by the content of files and flags; nothing needs to be overwritten",
    "global_batch_size": "it is --per_device_train_batch_size x --gradient_accumulation_steps x --data_parallel",
    "device": "a run takes the GPUs that there are; --backend gloo computes on CPUs",
    "device_map": "the stages are laid over the processes of torchrun: --num_stages",
    "cpu": "--backend gloo computes on CPUs",
    "wandb_entity": "set WANDB_ENTITY in the environment (in YAML below env:), and --report_to wandb",
    "stage": "there is one stage of post-training, supervised fine-tuning; --num_stages is the pipeline's",
    "do_predict_with_generate": "lopt-pp generate and lopt-pp evaluate do so afterwards",
    "min_lr": "see --lr_scheduler_type; schedules have the settings that they have by default",
    "dropout": "dropout is what the model's config has",
    "system_prompt": "put it into the rows, as a message of the role system",
    "config_file yaml": "it is --config here",
}

HINTS: dict[str, str] = {name: f"it is --{ours} here" for ours, names in _CALLED.items() for name in names.split()}
HINTS |= {name: said for names, said in _SAID.items() for name in names.split()}
"""What is said of a flag that is unknown here, by its name."""
