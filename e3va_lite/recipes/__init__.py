"""All settings of a training run, as YAML files and as the dataclasses that they fill."""
