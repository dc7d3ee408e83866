"""Controllers of this library as a policy of LeRobot, found by the distribution `lerobot_policy_dmc_hub`.

LeRobot looks for the three modules by these names. They need LeRobot, and nothing else imports them.
"""
