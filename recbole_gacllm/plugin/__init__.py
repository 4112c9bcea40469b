"""RecBole's side: repairs, registration, fast paths, keys of splits."""

#: What this package uses of RecBole 1.2.1 beyond what it documents: module:class -> names. A test
#: looks for each there, and for others in our code.
PRIVATE_NAMES = {
    "recbole.config.configurator:Config": (
        "_build_yaml_loader",
        "_init_device",
        "_init_parameters_category",
        "_load_config_files",
        "_load_internal_config_dict",
        "_load_variable_config_dict",
        "_merge_external_config_dict",
        "_update_internal_config_dict",
    ),
    "recbole.data.dataloader.abstract_dataloader:AbstractDataLoader": ("_dataset",),
    "recbole.data.dataloader.abstract_dataloader:NegSampleDataLoader": ("_neg_sampling",),
    "recbole.data.dataloader.general_dataloader:FullSortEvalDataLoader": (
        "_init_batch_size_and_step",
    ),
    "recbole.data.dataset.dataset:Dataset": (
        "_change_feat_format",
        "_check_field",
        "_get_load_and_unload_col",
        "_load_feat",
    ),
    "recbole.data.dataset.sequential_dataset:SequentialDataset": ("_aug_presets",),
    "recbole.evaluator.collector:DataStruct": ("_data_dict",),
    "recbole.model.general_recommender.dgcf:DGCF": ("_build_sparse_tensor",),
    "recbole.sampler.sampler:AbstractSampler": ("_pop_sampling",),
    "recbole.trainer.trainer:Trainer": (
        "_build_optimizer",
        "_full_sort_batch_eval",
        "_valid_epoch",
    ),
    "recbole.utils.wandblogger:WandbLogger": ("_wandb",),
}
