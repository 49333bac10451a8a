"""What `pyproject.toml` cannot say: `conf/`, which lies in the project's folder, is `jobs/conf` in a wheel.

There, packages that are found and a folder that gets another name do not go together. Everything else stands there.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["neg_service*", "jobs*"]), "jobs.conf"],
    package_dir={"jobs.conf": "conf"},
    include_package_data=False,  # what is not named below stays out
    package_data={
        "neg_service": ["py.typed", "prompts/templates_of_tasks/*.toml", "report/templates/*.j2"],
        "jobs.conf": ["**/*.yaml"],
    },
)
