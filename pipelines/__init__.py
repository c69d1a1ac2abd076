"""How the assets are run: definitions, jobs, schedules and sensors."""
