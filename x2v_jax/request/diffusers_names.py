"""What users of diffusers (and of Wan's and LightX2V's programs) write, and what is meant here."""

from typing import NoReturn

from x2v_jax import shipped
from x2v_jax.errors import UserError

OUTPUT_TYPES = ("np", "pil")

_TEXTS = "give text_embeddings=FILE, a safetensors file with `text` [L, D] (and `negative_text`)"
_LIST = "give denoising_step_list, the timesteps themselves"
_ONE = "this library returns the frames themselves, and generate(Request(…)) latents and times too; leave it out"
_NOTHING = "there is nothing like it here; leave it out"
# Keywords of a call.
FIELDS = {
    "prompt_embeds": _TEXTS,
    "negative_prompt_embeds": _TEXTS,
    "image_embeds": "give image=, and it is encoded here",
    "last_image": "this library makes no video between two pictures; leave it out",
    "num_images_per_prompt": "give num_videos_per_prompt",
    "guidance_scale_2": "these models have one network; give guidance_scale",
    "max_sequence_length": "the checkpoint says how many tokens are read; leave it out",
    "attention_kwargs": "attention is chosen when the pipeline is made: from_checkpoint(…, attention=…)",
    "cross_attention_kwargs": "attention is chosen when the pipeline is made, LoRAs too: from_checkpoint(…, loras=…)",
    "return_dict": _ONE,
    "callback_on_step_end_tensor_inputs": "a callback gets the latents, and nothing else; leave it out",
    "callback": "give on_step=f, called with (step, number of steps, latents)",
    "callback_steps": "on_step is called after each step; leave it out",
    "timesteps": _LIST,
    "sigmas": f"{_LIST} (1000 times sigma)",
    "eta": _NOTHING,
    "clip_skip": _NOTHING,
    "guidance_rescale": _NOTHING,
    "ip_adapter_image": _NOTHING,
    "strength": _NOTHING,
    "video": "give continue_from=FILE for a video that goes on, with a causal checkpoint",
    "flow_shift": "give shift",
    "sample_shift": "give shift",
    "sample_guide_scale": "give guidance_scale",
    "cfg_scale": "give guidance_scale",
    "steps": "give num_inference_steps",
    "num_steps": "give num_inference_steps",
    "infer_steps": "give num_inference_steps",
    "sample_steps": "give num_inference_steps",
    "sampling_steps": "give num_inference_steps",
    "frame_num": "give num_frames",
    "length": "give num_frames",
    "target_video_length": "give num_frames",
    "frame_rate": "give fps",
    "size": "give height and width",
    "resolution": "give height and width",
    "n_prompt": "give negative_prompt",
    "image_path": "give image",
    "base_seed": "give seed",
    "num_videos": "give num_videos_per_prompt",
    "lora": "LoRAs are given when the pipeline is made: from_checkpoint(…, loras=…)",
    "loras": "LoRAs are given when the pipeline is made: from_checkpoint(…, loras=…)",
}
_DEVICE = "jax takes the GPU where it has one; the environment variable JAX_PLATFORMS=cpu keeps it off"
_DOWNLOAD = "give the folder of a converted checkpoint; `hf download ORG/NAME --local-dir DIR` brings the published one"
_FROM_FOLDER = "all networks come from the checkpoint's folder; convert one that has the wanted ones"
# Keywords of `from_checkpoint`.
OPTIONS = {
    "torch_dtype": 'give dtype="bfloat16" or "float32"',
    "device": _DEVICE,
    "device_map": _DEVICE,
    "variant": _DOWNLOAD,
    "revision": _DOWNLOAD,
    "subfolder": _DOWNLOAD,
    "cache_dir": _DOWNLOAD,
    "token": _DOWNLOAD,
    "local_files_only": _DOWNLOAD,
    "force_download": _DOWNLOAD,
    "use_safetensors": "converted checkpoints always are; leave it out",
    "low_cpu_mem_usage": "weights are read when they are needed anyway; leave it out",
    "transformer": _FROM_FOLDER,
    "vae": _FROM_FOLDER,
    "text_encoder": _FROM_FOLDER,
    "image_encoder": _FROM_FOLDER,
    "tokenizer": _FROM_FOLDER,
    "scheduler": "the schedule travels with the checkpoint: `convert wan … --schedule`",
    "quantization_config": "8-bit weights are made by `convert wan … --quantize int8`",
    "safety_checker": _NOTHING,
    "attn_implementation": "give attention=",
    "lora_strength": "give loras={FILE: STRENGTH}",
    "lora_scale": "give loras={FILE: STRENGTH}",
}
_LORAS = 'give LoRAs when the pipeline is made: Pipeline.from_checkpoint(PATH, loras={"file.safetensors": 0.8})'
_OFFLOAD = 'give Pipeline.from_checkpoint(PATH, offload="blocks"); encoders leave the device by themselves'
_VAE = 'give Pipeline.from_checkpoint(PATH, vae_decode="tiled")'
_ATTENTION = "attention needs no such choice here: Pipeline.from_checkpoint(PATH, attention=…)"
_SCHEDULER = "the schedule is pipe.checkpoint.schedule, and `convert wan … --schedule` sets it"
# Methods and attributes of diffusers' pipelines.
METHODS = {
    "to": f"the pipeline is moved nowhere: {_DEVICE}",
    "cuda": f"the pipeline is moved nowhere: {_DEVICE}",
    "cpu": f"the pipeline is moved nowhere: {_DEVICE}",
    "half": 'the default is bfloat16; else give Pipeline.from_checkpoint(PATH, dtype="float32")',
    "from_pretrained": "write Pipeline.from_checkpoint(PATH), with a folder that `{convert}` made",
    "from_single_file": "write Pipeline.from_checkpoint(PATH), with a folder that `{convert}` made",
    "from_pipe": "write Pipeline.from_checkpoint(PATH) for another pipeline",
    "save_pretrained": "checkpoints go back to diffusers' layout with `{export}`",
    "push_to_hub": "checkpoints go back to diffusers' layout with `{export}`",
    "load_lora_weights": _LORAS,
    "load_lora_adapter": _LORAS,
    "set_adapters": _LORAS,
    "fuse_lora": _LORAS,
    "unfuse_lora": f"LoRAs are merged into the weights; {_LORAS}",
    "unload_lora_weights": f"LoRAs are merged into the weights; {_LORAS}",
    "delete_adapters": f"LoRAs are merged into the weights; {_LORAS}",
    "enable_model_cpu_offload": _OFFLOAD,
    "enable_sequential_cpu_offload": _OFFLOAD,
    "enable_group_offload": _OFFLOAD,
    "enable_vae_slicing": _VAE,
    "enable_vae_tiling": _VAE,
    "disable_vae_slicing": _VAE,
    "disable_vae_tiling": _VAE,
    "enable_attention_slicing": _ATTENTION,
    "enable_xformers_memory_efficient_attention": _ATTENTION,
    "set_progress_bar_config": "give progress=True or False to from_checkpoint or to the call",
    "progress_bar": "give progress=True or False to from_checkpoint or to the call",
    "scheduler": _SCHEDULER,
    "transformer": "the networks are inside; `pipe.checkpoint` says what they are",
    "vae": "the networks are inside; `pipe.checkpoint` says what they are",
    "text_encoder": "the networks are inside; `pipe.checkpoint` says what they are",
    "device": _DEVICE,
    "interrupt": "raise an exception in on_step to end a run",
    "encode_prompt": "give texts with prompt, or their embeddings with text_embeddings=FILE",
    "compile": "everything is compiled anyway",
}


class _NoSuchName(UserError, AttributeError):
    """Of both kinds, so that hasattr(pipe, "to") is False."""


class _Refused:
    """An attribute that answers with a sentence, of the class and of its instances."""

    def __init__(self, name: str, advice: str):
        self._name, self._advice = name, advice

    def __get__(self, instance: object, owner: type) -> NoReturn:
        commands = {"convert": shipped.command("convert wan SRC DST"), "export": shipped.command("convert export")}
        advice = self._advice.format(**commands) if self._advice.count("`{") else self._advice
        raise _NoSuchName(f"{owner.__name__} has no {self._name!r} as diffusers' pipelines do; {advice}")


def refuse_methods(of: type) -> None:
    """Lets the names of `METHODS` answer with a sentence."""
    for name, advice in METHODS.items():
        setattr(of, name, _Refused(name, advice))
