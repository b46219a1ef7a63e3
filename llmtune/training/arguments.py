"""Our knobs as trl's arguments, with everything trl would do by itself switched off."""

import torch
from trl import SFTConfig

from llmtune.io.run_dir import RunDir
from llmtune.training.config import TrainConfig

OPTIMIZERS = {"adamw": "adamw_torch_fused", "adamw_8bit": "adamw_bnb_8bit"}


def build_arguments(
    config: TrainConfig,
    run: RunDir,
    *,
    num_rows: tuple[int, int],
    device: torch.device,
    uses_fp16: bool,
    seed: int,
) -> SFTConfig:
    """Return trl's arguments for a run over `num_rows` (training, evaluation) rows.

    One data-loader item is a whole optimizer step, so there is no accumulation here; precision,
    recomputation, schedule and checkpoints are ours (see `AdapterTrainer`).
    """
    total_steps = config.total_steps(num_rows[0])
    has_evaluation = num_rows[1] > 0
    arguments = SFTConfig(
        output_dir=str(run.checkpoints_dir),
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=1,
        max_steps=total_steps,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim=OPTIMIZERS[config.optimizer],
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if has_evaluation else "no",
        # Without eval_every the only evaluation is the one transformers adds at the last step.
        eval_steps=(config.eval_every or total_steps + 1) if has_evaluation else None,
        save_strategy="steps",
        save_steps=config.save_every,
        report_to=list(config.report_to) or "none",
        seed=seed,
        data_seed=seed,
        use_cpu=device.type == "cpu",
        bf16=False,
        fp16=uses_fp16,
        # None is off for every version, and does not name the deprecated alias.
        gradient_checkpointing=None,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        prediction_loss_only=True,
        router_aux_loss_coef=0.0,
    )
    # One process, one GPU: with several visible ones transformers would split the batch.
    _ = arguments.device
    arguments._n_gpu = min(arguments._n_gpu, 1)
    return arguments
