"""What all suites share."""

from hypothesis import HealthCheck, settings

# A machine that is busy with something else must fail no test.
settings.register_profile("penstock", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("penstock")
