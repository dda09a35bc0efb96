"""What becomes of the flags of `trl sft` on checkpoints, logs and evaluation. `trl_flags.py` joins the sections."""

from lopt_pp.config.foreign_rules import (
    MISSING,
    NO_EFFECT,
    SAME,
    Row,
    ignored,
    one_of,
    resume,
    share_of_steps,
    trackers,
    unless,
)

RUN: dict[str, list[Row]] = {
    "Checkpoints, logs, the hub": [
        Row(
            "output_dir save_total_limit",
            SAME,
            "a directory with a model or another run's checkpoints is refused; see `--overwrite_output_dir`",
        ),
        Row("save_steps", SAME, "a whole number, 500 by default; the last step is saved as well", share_of_steps("")),
        Row(
            "save_strategy",
            SAME,
            "`no` is `--save_steps 0`; with `best`, too, the last step and a run that is stopped are saved",
            one_of(
                {
                    "no": {"save_steps": 0},
                    "steps": {},
                    "epoch": {"save_strategy": "epoch"},
                    "best": {"save_strategy": "best"},
                }
            ),
        ),
        Row("resume_from_checkpoint", SAME, "a directory, or `latest`", resume),
        Row(
            "enable_jit_checkpoint",
            NO_EFFECT,
            "always so: SIGTERM, SIGINT, SIGUSR1 and SIGHUP save a [checkpoint](checkpoints.md#stopping)",
            ignored,
        ),
        Row("save_only_model", MISSING, "`lopt-pp export` makes the model of a checkpoint", unless()),
        Row("save_on_each_node", MISSING, "`--output_dir` is shared by all machines", unless()),
        Row(
            "restore_callback_states_from_checkpoint",
            NO_EFFECT,
            "callbacks begin anew, with all logs in `state`",
            ignored,
        ),
        Row("logging_steps", SAME, "of the log lines; [metrics.jsonl](metrics.md) has every step", share_of_steps("")),
        Row("logging_first_step disable_tqdm", SAME),
        Row(
            "logging_strategy",
            SAME,
            "[metrics.jsonl](metrics.md) has every step whatever it says",
            one_of({word: {"logging_strategy": word} for word in ("no", "steps", "epoch")}),
        ),
        Row(
            "log_on_each_node include_num_input_tokens_seen log_level log_level_replica",
            NO_EFFECT,
            "[metrics.jsonl](metrics.md) has every step, with its tokens",
            ignored,
        ),
        Row("logging_nan_inf_filter", NO_EFFECT, "a loss that is not finite ends the run", ignored),
        Row(
            "report_to",
            SAME,
            "one or several, with the names of transformers; nothing by default. `lopt-pp report` makes a "
            "[page](insight.md) of any run",
            trackers,
        ),
        Row("run_name", SAME),
        Row("project", SAME, "of all trackers that have projects or experiments"),
        Row("trackio_space_id trackio_bucket_id trackio_static_space_id", SAME, "read by trackio"),
        Row(
            "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision",
            SAME,
            "what is published is named in [The hub](hub.md); `lopt-pp push` does it later",
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
            SAME,
            "`steps`, with `--eval_steps`, or `epoch`; `no` is to give no held-out rows. For the last step alone: "
            "`--eval_steps 0`",
            one_of({"no": {}, "steps": {}, "epoch": {"eval_strategy": "epoch"}}),
        ),
        Row("eval_on_start", SAME, "as step 0"),
        Row("load_best_model_at_end", SAME),
        Row("metric_for_best_model", SAME, "`loss` by default; to be named where there are several evaluation sets"),
        Row("greater_is_better", SAME, "by default so, but for losses and perplexities"),
        Row("eval_delay", SAME, "the last step is evaluated whatever it says"),
        Row(
            "prediction_loss_only eval_accumulation_steps eval_do_concat_batches eval_use_gather_object "
            "batch_eval_metrics",
            NO_EFFECT,
            "loss and perplexity are measured, and no logits are kept",
            ignored,
        ),
        Row(
            "include_for_metrics",
            MISSING,
            "`--compute_metrics` has the likeliest tokens, the labels and the losses; there are no inputs",
            unless("loss"),
        ),
        Row(
            "bf16_full_eval fp16_full_eval",
            NO_EFFECT,
            "nor has it in transformers while a run trains: an evaluation computes in `--dtype`",
            ignored,
        ),
        Row(
            "do_train do_eval do_predict", NO_EFFECT, "a run trains, and evaluates where it has held-out rows", ignored
        ),
    ],
}
