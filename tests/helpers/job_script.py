"""What is in a job's script."""

import subprocess


def variables(script: str, *names: str) -> list[str]:
    """What the shell reads in the part that is filled in."""
    top = script.split("\n# ---", 1)[0]
    show = "".join(f'printf "%s\\0" "${{{name}[@]}}"; printf "\\n\\0"\n' for name in names)
    shown = subprocess.run(["bash", "-c", f"{top}\n{show}"], capture_output=True, text=True, check=True).stdout
    return [part.removesuffix("\0").replace("\0", "|") for part in shown.split("\n\0")[:-1]]
