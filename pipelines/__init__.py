"""Control pipelines: one `DiffusionPipeline` per file, each of which also goes to the Hub."""

from dmc_hub.pipelines.diffuser_planner import DiffuserPlannerPipeline, PlannerOutput
from dmc_hub.pipelines.diffusion_policy import DiffusionPolicyPipeline, PolicyOutput

__all__ = ["DiffuserPlannerPipeline", "DiffusionPolicyPipeline", "PlannerOutput", "PolicyOutput"]
