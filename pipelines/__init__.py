"""How the assets are run: definitions, jobs, schedules and sensors."""

import warnings

from dagster import BetaWarning, PreviewWarning

# Partitions within one run and Pipes are marked beta or preview; requirements.lock pins what was tested.
warnings.filterwarnings("ignore", category=BetaWarning)
warnings.filterwarnings("ignore", category=PreviewWarning)
