"""The training of a run: its SFT, reward-model and RL stages.

run               what stages share, and their loop: resume, step, record, save, stop
setup             builds what a config names: model, tokenizer, training state
sft               the Instruct stage
rl                the RL stage with its iterations, which begin with π_ref ← π_θ
rl_step           one RL step, from the questions to the metrics
rl_programs       the compiled programs of an RL step, and its batch layout
rollouts          samples and scores a step's outputs; DAPO's dynamic sampling
rollout_pipeline  samples the next rollout during this update (max_staleness)
run_rewards       the reward functions of a config, applied to outputs
credit            from rewards to the advantages of tokens; DPO's pairs
batch             `Sample` and `Batch`
packing           samples in packed rows; `row_placement` decides which share a row
objectives        the model on packed rows, followed by a loss
train_step        the compiled update: micro-batches, gradients, skipped steps
optimizers        AdamW, gradient clipping, master weights, learning-rate schedules
reward_model      labels, training and scores of the reward model
run_comparison    evaluates a run's models, during training and at its end
run_census        the census of a run's questions
diagnosis         says why a run does not learn
metrics_writer    metrics.jsonl, samples.jsonl, TensorBoard, Weights & Biases
command_line      parses `--config FILE --config.field=value`
config_checks     refuses configs that would fail or be ignored later
work_directory    ties a work directory to its config; `start_time` to its date
"""
