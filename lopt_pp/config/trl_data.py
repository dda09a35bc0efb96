"""What becomes of the flags of `trl sft` on the model and the rows. `trl_flags.py` joins the sections."""

from lopt_pp.config.foreign_rules import (
    MISSING,
    NO_EFFECT,
    SAME,
    Row,
    dtype,
    ignored,
    max_length,
    model_init_kwargs,
    one_of,
    renamed,
    unless,
    unless_none,
    word_of,
)

DATA: dict[str, list[Row]] = {
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
            one_of({"true": {"dtype": "bfloat16"}, "false": {"dtype": "float32"}}),
        ),
        Row("fp16", MISSING, "float16 would need its loss scaled; take `--dtype bfloat16`", unless()),
        Row("tf32", SAME),
        Row(
            "model_init_kwargs",
            "attn_implementation dtype model_revision trust_remote_code",
            "those of them that are flags; the model is as its config says",
            model_init_kwargs,
        ),
        Row("use_cache", NO_EFFECT, "training has no cache of keys and values", ignored),
        Row(
            "router_aux_loss_coef",
            SAME,
            "off by default, where TRL takes the coefficient of the model's config; each block has "
            "[its own layers' share](models.md#mixtures-of-experts)",
        ),
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
        Row("datasets", SAME, "a list in the YAML file; also of local files, and with `repeats`"),
        Row(
            "max_length",
            SAME,
            "longer rows are left out and counted, unless they are split or `--truncation_mode` cuts them",
            max_length,
        ),
        Row(
            "truncation_mode",
            SAME,
            "not given, as by default, longer rows are left out; TRL cuts them by `keep_start` then",
        ),
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
            "also where it is not given: true for a prompt and its completion. With `true` or `false` the whole "
            "completion counts, or every token; not given, of a completion of messages the assistant's turns",
            unless_none,
        ),
        Row(
            "assistant_only_loss",
            SAME,
            "not given it is as `true`, for conversations. It needs no generation marks; answers need a stop token, "
            "or `--allow_no_stop_token`",
            unless_none,
        ),
        Row("packing", SAME),
        Row(
            "packing_strategy",
            SAME,
            "with `bfd`, longer rows are left out and counted, not cut. With `bfd` and `bfd_split` attention never "
            "crosses from row to row, with any kernel",
        ),
        Row("eval_packing", NO_EFFECT, "held-out rows are not packed; they are split where training rows are", ignored),
        Row("padding_free", SAME, "meant for flash attention here, too"),
        Row("dataset_text_field dataset_num_proc", SAME),
        Row(
            "chat_template_path",
            SAME,
            "tokens that the template needs and the tokenizer lacks are named by `--added_tokens`, and the end of a "
            "turn by `--eos_token`; TRL takes both over from the template's tokenizer",
        ),
        Row("pad_to_multiple_of", NO_EFFECT, "padding changes no loss", ignored),
        Row("length_column_name", NO_EFFECT, "lengths are those of the tokenized rows", ignored),
        Row("dataset_kwargs", MISSING, "tokenized rows are known by their columns: see [Data](data.md)", unless()),
        Row("eos_token pad_token", SAME, "a new one is added by `--added_tokens`, with embeddings for it"),
        Row("dataloader_drop_last", SAME, "of the training rows; all held-out rows are measured"),
        Row(
            "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
            "dataloader_multiprocessing_context dataloader_in_order",
            NO_EFFECT,
            "tokens are cached on disk before training",
            ignored,
        ),
        Row("remove_unused_columns", NO_EFFECT, "columns that are not used are left out", ignored),
        Row("label_names", MISSING, "labels are made of the rows, or are their column `labels`", unless()),
        Row(
            "ignore_data_skip",
            MISSING,
            "it saves the time to come to the next rows; here that takes none, so a run goes on with them",
            unless(),
        ),
    ],
}
