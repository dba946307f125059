"""SVDQuant Replay Steps."""

from ..svdq_core.host.replay import replay_steps


class SVDQuantReplaySteps:
    """MODEL -> the same, whose steps are recorded once and replayed as CUDA graphs."""

    CATEGORY = "SVDQuant"
    DESCRIPTION = (
        "Records a step of each sampling run as a CUDA graph and replays it, instead of launching every kernel anew. "
        "For models of many small layers on a fast GPU, where launching takes longer than computing: SDXL above all. "
        "Images are the same. Steps with patches or hooks, and models that do not fit the GPU as a whole, run as ever."
    )
    FUNCTION = "apply"
    RETURN_TYPES = ("MODEL",)
    OUTPUT_TOOLTIPS = ("The same model, with its steps replayed.",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": (
                    "MODEL",
                    {"tooltip": "Any model, 4-bit or 16-bit. Put this node last, behind LoRAs and model sampling."},
                )
            }
        }

    def apply(self, model):
        return (replay_steps(model),)
